"""How the streams of a sweep and their batches lie on devices."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtta import parallel
from jaxtta.adapters import Adapter
from jaxtta.data import StreamBatch

Split = Literal["streams", "batch"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices with the parameters on them."""

    params: Any
    devices: int = 1  # without streams of their own, some are idle
    streams: int = 1  # step at once, each on its own device
    mesh: Any = None  # of jaxtta.parallel; None for one device

    @property
    def splits_batch(self) -> bool:
        """Whether each batch lies on all devices."""
        return self.mesh is not None and self.streams == 1

    def compile(self, adapter: Adapter, states: Any, inputs: Any) -> Callable[..., Any]:
        """Compile the step for what `states` and `batch` give."""
        if self.streams > 1:
            adapter = parallel.streams(adapter, self.mesh)
        whole = NamedSharding(self.mesh, P()) if self.splits_batch else None
        with jax.set_mesh(self.mesh) if self.splits_batch else contextlib.nullcontext():
            step = jax.jit(adapter.step, donate_argnums=1, out_shardings=whole)
            return step.lower(self.params, states, inputs).compile()

    def states(self, states: Sequence[Any]) -> Any:
        """The streams' states where the step wants them."""
        if self.streams == 1:
            return states[0] if self.mesh is None else parallel.replicate(states[0], self.mesh)
        parallel.require_arrays(states[0])
        filled = [*states] + [states[0]] * (self.streams - len(states))
        share = NamedSharding(self.mesh, P("streams"))  # leaf by leaf, as all are on one device
        return jax.tree.map(lambda *leaves: jax.device_put(jnp.stack(leaves), share), *filled)

    def apart(self, states: Any) -> list[Any]:
        """Each stream's state, in numpy."""
        states = jax.device_get(states)  # cut here, as devices would do it together
        if self.streams == 1:
            return [states]
        return [jax.tree.map(itemgetter(place), states) for place in range(self.streams)]

    def batch(self, batches: Sequence[StreamBatch | None]) -> tuple[StreamBatch, StreamBatch]:
        """The streams' batches, (streams, …) if several: in numpy, and where the step wants them.

        None, for a stream at its end, gives a masked batch.
        """
        joined = next(batch for batch in batches if batch is not None)
        if self.mesh is None:
            return joined, joined
        if self.streams > 1:
            blank = joined._replace(mask=np.zeros_like(joined.mask))
            filled = [batch or blank for batch in batches]
            filled += [blank] * (self.streams - len(batches))
            joined = jax.tree.map(lambda *arrays: np.stack(arrays), *filled)
        sharding = NamedSharding(self.mesh, P("batch" if self.splits_batch else "streams"))
        put = lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)  # noqa: E731
        return joined, jax.tree.map(put, joined._replace(source_index=None, segments=None))


def require_devices(devices: int | None, split: Split, batch_size: int) -> int:
    """The number of devices, None being one; a ValueError if they are not to be had."""
    count, found, hosts = 1 if devices is None else devices, jax.device_count(), jax.process_count()
    if not 1 <= count <= found:
        raise ValueError(f"devices is {count}, expected 1 to {found}, as many as there are")
    if split not in ("streams", "batch"):
        raise ValueError(f"split is {split!r}, expected streams or batch")
    if hosts > 1 and (split == "streams" or count < found):
        said = "expected split batch and all devices, or a sweep with a shard of its own on each"
        raise ValueError(f"{hosts} hosts with split {split} and {count} devices: {said}")
    if split == "batch" and batch_size % count:
        raise ValueError(f"batch_size is {batch_size}, expected a multiple of the {count} devices")
    return count


def place(params: Any, devices: int, split: Split, streams: int) -> Placement:
    """Place so many streams on as many devices as they need."""
    each, together = (devices, 1) if split == "batch" else (1, max(min(streams, devices), 1))
    if together * each == 1:
        return Placement(params, devices)
    mesh = parallel.mesh(together, each, jax.devices()[: together * each])
    return Placement(parallel.replicate(params, mesh), devices, together, mesh)
