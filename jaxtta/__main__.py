"""`python -m jaxtta` is the `jaxtta` command."""

from jaxtta.cli.main import main

main()
