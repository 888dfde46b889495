"""Many streams over many devices, and one batch over several.

Streams that are adapted one by one need nothing from each other, so a device takes its share of
them and no device waits for another:

    mesh = jaxtta.parallel.mesh()                            # all devices
    many = jaxtta.parallel.streams(adapter, mesh)
    params = jaxtta.parallel.replicate(params, mesh)         # once; else every step copies them
    states = many.init(params, jax.random.split(key, 16))    # 16 streams
    step = jax.jit(many.step, donate_argnums=1)
    states, predictions = step(params, states, batches)      # batches: (16, batch, …)

One stream's batch over devices is the same step in the global view, which the losses allow:

    mesh = jaxtta.parallel.mesh(streams=1, batch=8)
    params, state = jaxtta.parallel.replicate((params, adapter.init(params)), mesh)
    batch = jax.device_put(batch, jaxtta.parallel.batch_sharding(mesh))
    with jax.set_mesh(mesh):                                 # spreads the class prompts too
        state, prediction = step(params, state, batch)
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtta.adapters import Adapter, Prediction

Array = jax.Array


def mesh(streams: int | None = None, batch: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices by streams and, within a stream, by images.

    Args:
        streams: how many devices share the streams; None for all that `batch` leaves.
        batch: how many devices share each batch.
        devices: which devices; None for all, those of other processes too.

    Returns:
        A mesh (streams, batch) of all devices, its axes automatic.

    Raises:
        ValueError: if streams times batch is not the number of devices.

    Examples:
        >>> two_by_four = jaxtta.parallel.mesh(batch=4, devices=jax.devices()[:8])  # of 8 devices
        >>> dict(two_by_four.shape)
        {'streams': 2, 'batch': 4}
    """
    chosen = np.asarray(jax.devices() if devices is None else devices)
    if streams is None:
        streams = chosen.size // max(batch, 1)
    if min(streams, batch) < 1 or streams * batch != chosen.size:
        raise ValueError(
            f"a mesh of {streams} × {batch} (streams × batch) does not hold {chosen.size} devices, "
            "expected their number as the product; devices=jax.devices()[:n] chooses some"
        )
    types = (AxisType.Auto, AxisType.Auto)
    return Mesh(chosen.reshape(streams, batch), ("streams", "batch"), axis_types=types)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Place every leaf once on all devices of the mesh.

    Args:
        tree: a pytree of arrays.
        mesh: the mesh.

    Returns:
        The tree, each leaf whole on every device.

    Examples:
        >>> mesh = jaxtta.parallel.mesh()  # all devices
        >>> params = jaxtta.parallel.replicate({"scale": jnp.ones(3)}, mesh)
        >>> len(params["scale"].devices()) == jax.device_count()
        True
    """
    return jax.device_put(tree, NamedSharding(mesh, P()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Say how the images of one stream's batch lie on the mesh, for `jax.device_put`.

    Args:
        mesh: a mesh with an axis "batch".

    Returns:
        The sharding, of the leading axis over "batch".

    Raises:
        ValueError: if the mesh has no such axis.

    Examples:
        >>> mesh = jaxtta.parallel.mesh(streams=1, batch=jax.device_count())
        >>> images = np.zeros((2 * jax.device_count(), 32, 32, 3), np.uint8)
        >>> batch = jax.device_put(images, jaxtta.parallel.batch_sharding(mesh))
        >>> batch.addressable_shards[0].data.shape  # two images on each device
        (2, 32, 32, 3)
    """
    _require_axis(mesh, "batch")
    return NamedSharding(mesh, P("batch"))


def streams(
    adapter: Adapter, mesh: Mesh | None = None, within: Literal["map", "vmap"] = "map"
) -> Adapter:
    """Adapt many independent streams, spread over devices.

    Args:
        adapter: the method.
        mesh: a mesh with an axis "streams"; None for all devices of this process.
        within: how a device goes through its own streams: "map", one after another in the memory
            of one; "vmap", all at once.

    Returns:
        An adapter of all streams. `init(params, keys)` takes a key per stream and computes once
        what no key touches, such as class embeddings; `step(params, states, batches)` has a leading
        axis of streams in every leaf of states, batches and predictions. The states lie on
        `PartitionSpec("streams")`. A stream whose batch is fully masked keeps its state bit for
        bit, so streams of unequal length are filled up with such batches. Both functions raise a
        ValueError if the streams do not divide over the devices, if leading axes differ, and if the
        parameters are not replicated on the mesh (inside `jit` that cannot be seen); `init` raises
        a TypeError for a state that holds anything but arrays.

    Raises:
        ValueError: if the mesh has no axis "streams" or explicit axes, or `within` is neither.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example, two streams on each device:

        >>> mesh, count = jaxtta.parallel.mesh(), 2 * jax.device_count()
        >>> params = jaxtta.parallel.replicate(params, mesh)
        >>> many = jaxtta.parallel.streams(jaxtta.adapters.tent(model, task), mesh)
        >>> states = many.init(params, jax.random.split(jax.random.key(0), count))
        >>> states.seen.shape == (count,)  # `step` takes batches (count, batch, height, width, 3)
        True
    """
    if within not in ("map", "vmap"):
        raise ValueError(f'within is "{within}", expected "map" or "vmap"')
    on = _local_mesh() if mesh is None else mesh
    _require_axis(on, "streams")
    if any(kind != AxisType.Auto for kind in on.axis_types):
        raise ValueError(
            "the mesh has explicit axes, expected automatic ones as of jaxtta.parallel.mesh()"
        )

    def local(params: Any, states: Any, batches: Any) -> tuple[Any, Prediction]:
        if within == "vmap":
            return jax.vmap(adapter.step, (None, 0, 0))(params, states, batches)
        return jax.lax.map(lambda one: adapter.step(params, *one), (states, batches))

    specs = P(), P("streams"), P("streams")
    # An adapter may call back to the host only where no axis is automatic.
    manual = {name for name, size in on.shape.items() if name == "streams" or size == 1}
    # Streams share nothing, so that there is nothing to check; methods would have to say of every
    # constant that begins a loop that it is one stream's (`jax.lax.pcast`).
    how: Any = {"axis_names": manual, "check_vma": False}
    shared = jax.shard_map(local, mesh=on, in_specs=specs, out_specs=P("streams"), **how)
    share = NamedSharding(on, P("streams"))
    init_all = jax.jit(jax.vmap(_of_arrays(adapter), (None, 0)), out_shardings=share)
    # States leave a step as they came, or the next would be compiled anew.
    step_all = jax.jit(shared, out_shardings=(share, None))

    def init(params: Any, key: Array | None = None) -> Any:
        _require_divisible(_count_streams(keys=key), on)
        _require_replicated(params, on)
        return init_all(params, key)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Prediction]:
        _require_divisible(_count_streams(states=state, batches=batch), on)
        _require_replicated(params, on)
        return step_all(params, state, batch)

    return Adapter(init, step)


def pmap(adapter: Adapter) -> Adapter:
    """Adapt one stream on each device by `jax.pmap`; `streams` gives the same and takes more.

    Args:
        adapter: the method.

    Returns:
        An adapter of as many streams as there are devices, or fewer, with the leading axes of
        `streams`. Parameters from `replicate(params, mesh())` are not copied at each step. Both
        functions raise a ValueError for more streams than devices.
    """
    init_all = jax.pmap(_of_arrays(adapter), in_axes=(None, 0))
    step_all = jax.pmap(adapter.step, in_axes=(None, 0, 0))

    def require_devices(count: int) -> None:
        if count > (devices := jax.local_device_count()):
            raise ValueError(
                f"{count} streams are more than the {devices} devices, and pmap gives each its "
                "own: jaxtta.parallel.streams takes several to a device"
            )

    def init(params: Any, key: Array | None = None) -> Any:
        require_devices(_count_streams(keys=key))
        return init_all(params, key)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Prediction]:
        require_devices(_count_streams(states=state, batches=batch))
        return step_all(params, state, batch)

    return Adapter(init, step)


def require_arrays(state: Any) -> None:
    """Raise a TypeError for a state that cannot be stacked with those of other streams.

    Args:
        state: of an adapter.

    Raises:
        TypeError: if a leaf is not an array or a number; it is named.
    """
    for name, leaf in _leaves(state):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
            raise TypeError(
                f"{name} of the adapter's state is a {type(leaf).__name__}, expected an "
                "array: the states of many streams are stacked"
            )


def _local_mesh() -> Mesh:
    return mesh(devices=jax.local_devices())


def _of_arrays(adapter: Adapter) -> Any:
    """The adapter's init, which raises a TypeError for a state that cannot be stacked."""

    def init(params: Any, key: Array) -> Any:
        state = adapter.init(params, key)
        require_arrays(state)
        return state

    return init


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


def _require_axis(mesh: Mesh, name: str) -> None:
    if name not in mesh.axis_names:
        raise ValueError(
            f'the mesh has the axes {mesh.axis_names}, expected "{name}" among them: '
            "jaxtta.parallel.mesh() makes one"
        )


def _count_streams(**trees: Any) -> int:
    """The leading axis of every leaf; a ValueError if they differ."""
    shapes = [(name, np.shape(leaf)) for name, leaf in _leaves(trees)]
    if not shapes:
        raise ValueError(
            f"{' and '.join(trees)} hold no array, expected a leading axis of streams (keys are "
            "jax.random.split(key, streams))"
        )
    first, expected = shapes[0]
    for name, shape in shapes:
        if not shape:
            raise ValueError(f"{name} is a scalar, expected a leading axis of streams")
        if shape[0] != expected[0]:
            raise ValueError(
                f"{name} has {shape[0]} streams in front and {first} {expected[0]}, expected the "
                "same number in every leaf"
            )
    return expected[0]


def _require_divisible(count: int, mesh: Mesh) -> None:
    devices = mesh.shape["streams"]
    if count % devices:
        raise ValueError(
            f"{count} streams do not divide over {devices} devices: fill up to "
            f"{count + -count % devices} streams with fully masked batches, which leave their "
            "states as they are"
        )


def _require_replicated(params: Any, mesh: Mesh) -> None:
    devices = set(mesh.devices.flat)
    for name, leaf in _leaves(params):
        if isinstance(leaf, Tracer):
            continue
        sharding = getattr(leaf, "sharding", None)
        if not (sharding and sharding.is_fully_replicated and sharding.device_set == devices):
            raise ValueError(
                f"{name} of the parameters is not on all {len(devices)} devices of the mesh and "
                "would be copied to them at every step: params = "
                "jaxtta.parallel.replicate(params, mesh)"
            )
