r"""Repeat the run of a log, and say where it first differs.

    jaxtta replay serve.jsonl
    jaxtta replay serve.jsonl --images FOLDER       # where the images' names are relative to
    jaxtta replay serve.jsonl --adapter guarded:tent  # from which step on would it have differed?

On the same machine every answer and every state is the same, bit for bit. The images must be where
they were: of each, a digest of its pixels is in the log.

Exit codes: 0 if all steps are the same; 1 if one differs, which is named, or for an error.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from jaxtta.cli.options import group
from jaxtta.deploy.replay import replay


@group
class Options:
    """Repeat the run of a log."""

    log: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LOG")]  # of jaxtta serve
    images: Path = Path()  # folder that the images' names are relative to
    state: Path | None = None  # that the first step went on from, if it was not a new one
    model: str | None = None  # where the model is now
    adapter: str | None = None  # another one, to see where it differs


def run(options: Options) -> int:
    """Print what was found; return the exit code."""
    found = replay(
        options.log,
        folder=options.images,
        state=options.state,
        model=options.model,
        adapter=options.adapter,
    )
    if found.lost:
        print(f"the log lost {found.lost} steps as it was written", file=sys.stderr)
    print(f"{found.steps} steps with {found.images} images are the same, bit for bit")
    if found.difference:
        print(f"differs at {found.difference}")
    return 1 if found.difference else 0
