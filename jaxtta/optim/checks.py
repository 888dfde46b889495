"""What is taken for an optimiser."""

from typing import Any


def require_optimizer(optimizer: Any) -> None:
    """Raise a TypeError for anything but an optax transformation: a rate, a name, `optax.adam`."""
    if not (callable(getattr(optimizer, "init", None)) and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, expected an optax transformation such as "
            "optax.adam(1e-3)"
        )
