"""The laws that every adapter keeps, for the tests of a method of your own.

In a test of yours:

    def test_mine(model, params, task, images):
        check_adapter(mine.make(model, task), params, images)
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.adapters import Adapter
from jaxtta.io import load_state, save_state
from jaxtta.models import Batch


def check_adapter(
    adapter: Adapter,
    params: Any,
    images: np.ndarray,
    *,
    any_order: bool = True,
    tolerance: float = 1e-2,
) -> None:
    """Check that an adapter can be used wherever the package's own are.

    - Padding changes no prediction and no update.
    - A fully masked batch leaves the state bit-identical.
    - A permuted batch gives permuted predictions and the same update.
    - All batches of a stream, padded ones too, take one compilation.
    - An image that is not a number leaves no such number in the state.
    - `init` works again after a step whose state was donated.
    - A saved state goes on bit for bit.

    Args:
        adapter: with settings under which a step changes more than last bits.
        params: the model's.
        images: (batch, height, width, 3) of at least four images, as its step takes them.
        any_order: whether the images of a batch may come in any order; False for a method that
            takes them one after another.
        tolerance: of updates, as a share of their norm, and of logits.

    Raises:
        AssertionError: if a law is broken; the message says which.
    """
    count, traces = len(images), []
    assert count >= 4, f"{count} images, expected at least four"
    images = np.asarray(images, np.float32) / (255 if images.dtype == np.uint8 else 1)

    def traced(params: Any, state: Any, batch: Batch) -> Any:
        traces.append(batch)
        return adapter.step(params, state, batch)

    def batch_of(order: Any, mask: Any, values: np.ndarray = images) -> Batch:
        return Batch(values[order], np.asarray(mask, bool), np.asarray(order))

    straight, full, start = np.arange(count), np.ones(count), adapter.init(params)
    step = jax.jit(traced)
    after, prediction = step(params, start, batch_of(straight, full))
    assert np.ndim(prediction.logits) == 2 and len(prediction.logits) == count, (
        f"logits have shape {np.shape(prediction.logits)}, expected (batch, classes)"
    )
    assert np.isfinite(prediction.logits).all(), "logits of finite images are not finite"

    valid = straight < count - 1
    filled = np.where(valid[:, None, None, None], images, 1.0)
    padded, masked = step(params, start, batch_of(straight, valid, filled))
    assert len(traces) == 1, "a batch with padding is compiled anew"
    alone, expected = jax.jit(adapter.step)(params, start, batch_of(straight[:-1], full[:-1]))
    say = "padding changes the {}: does each mean over the batch use batch.mask?"
    _close(masked.logits[:-1], expected.logits, tolerance, say.format("predictions"))
    _close(_change(start, padded), _change(start, alone), tolerance, say.format("update"))

    empty, _ = step(params, after, batch_of(straight, 0 * full))
    assert _same(empty, after), "a fully masked batch changes the state"

    if any_order:
        other, permuted = step(params, start, batch_of(straight[::-1], full))
        say = "the order of a batch's images changes the {}"
        _close(permuted.logits[::-1], prediction.logits, tolerance, say.format("predictions"))
        _close(_change(start, other), _change(start, after), tolerance, say.format("update"))

    spoilt = images.copy()
    spoilt[0, 0, 0, 0] = np.nan
    left, _ = step(params, after, batch_of(straight, full, spoilt))
    assert np.isfinite(_change(start, left)).all(), "an image that is not a number stays in a state"

    donating = jax.jit(adapter.step, donate_argnums=1)
    for _ in range(2):
        again, _ = donating(params, adapter.init(params), batch_of(straight, full))
    assert _same(again, after), "init or a step gives something else the second time"

    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "state.safetensors", after)
        loaded = load_state(Path(folder) / "state.safetensors", like=start)
    assert _same(
        step(params, loaded, batch_of(straight, full)),
        step(params, after, batch_of(straight, full)),
    ), "a state that was saved and loaded goes on differently"


def _numbers(state: Any) -> list[np.ndarray]:
    """The leaves of a state, random keys as their integers."""
    keys = (jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(state))
    return [np.asarray(x) for x in keys]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _change(before: Any, after: Any) -> np.ndarray:
    """What a step has changed in a state, as one vector."""
    pairs = zip(_numbers(before), _numbers(after), strict=True)
    return np.concatenate(
        [np.zeros(1), *((b.astype(float) - a.astype(float)).ravel() for a, b in pairs)]
    )


def _close(ours: Any, expected: Any, tolerance: float, message: str) -> None:
    ours, expected = np.asarray(ours, float), np.asarray(expected, float)
    assert np.linalg.norm(ours - expected) <= tolerance * np.linalg.norm(expected), message


def _same(ours: Any, expected: Any) -> bool:
    pairs = zip(_numbers(ours), _numbers(expected), strict=True)
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)
