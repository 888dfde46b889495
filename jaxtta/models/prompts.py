"""Class prompts, packed: no token after an end of text, the shared beginning once.

CLIP's text attention is causal and the embedding is read at the end-of-text token, so (1) tokens
after it change nothing, and (2) the first tokens that all prompts share have the same keys and
values in all of them. The 1,000 ImageNet prompts "a photo of a {}." are 77,000 tokens unpacked,
18,000 cut to the longest, and 4,170 packed; all three give the same embeddings.

In SigLIP every token attends to every other one of its prompt, padding too, and the embedding is
read at the last: its prompts are encoded as they are, filled up to the model's length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh

from jaxtta.models.attention import attention
from jaxtta.models.task import Task
from jaxtta.models.transformer import Attend, Select

Array = jax.Array
MULTIPLE = 8  # of rows: XLA's programs for GPUs copy others before each product in bfloat16


class Prompts(NamedTuple):
    """A task's tokens, packed; an ordinary pytree whose shapes say how the packing is laid out.

    Rows are the shared prefix first, then the remaining tokens of prompt after prompt.

    Attributes:
        prefix: (prefix,) ids of the tokens that all prompts start with.
        tokens: (rows,) ids of all other tokens up to each prompt's end of text.
        positions: (rows,) their places in their prompts.
        grid: (prompts, longest) which of `tokens` stands where when prompts are laid out side
            by side; the number of rows, which is none of them, after an end of text.
        cells: (rows,) the inverse, into the flattened grid.
        ends: (classes, templates) the ends of text, as rows counted from the prefix's first.

    Examples:
        With `model` and `task` of `jaxtta.load`'s example:

        >>> prompts = model.prompts(task)  # "a photo of a …" is encoded once for all ten classes
        >>> prompts.ends.shape, len(prompts.prefix) + len(prompts.tokens) < task.token_ids.size
        ((10, 1), True)
    """

    prefix: Array | np.ndarray
    tokens: Array | np.ndarray
    positions: Array | np.ndarray
    grid: Array | np.ndarray
    cells: Array | np.ndarray
    ends: Array | np.ndarray


def ends_of_text(token_ids: np.ndarray | Array, eos_token_id: int) -> np.ndarray | Array:
    """Position of each prompt's end-of-text token, as transformers finds it.

    Args:
        token_ids: (…, length).
        eos_token_id: the config's; 2 stands for old configs, which mean the highest id.

    Returns:
        (…) positions; 0 where a prompt has no end of text.
    """
    if eos_token_id == 2:
        return token_ids.argmax(-1)
    return (token_ids == eos_token_id).argmax(-1)


def pack(task: Task, eos_token_id: int) -> Prompts:
    """Pack a task's prompts.

    Args:
        task: the task.
        eos_token_id: the model's end of text.

    Returns:
        The packed prompts, as numpy arrays.

    Raises:
        ValueError: if a prompt has no end-of-text token.
    """
    ids = task.token_ids.reshape(-1, task.token_ids.shape[-1])
    ends = np.asarray(ends_of_text(ids, eos_token_id))
    if eos_token_id != 2 and not (ids == eos_token_id).any(-1).all():
        missing = int(np.flatnonzero(~(ids == eos_token_id).any(-1))[0])
        raise ValueError(f"prompt {missing} has no end-of-text token ({eos_token_id})")
    same = (ids == ids[:1]).all(0)[: ends.min()]  # an end of text is never shared
    shared = len(same) if same.all() else int(same.argmin())
    lengths = ends + 1 - shared
    longest = lengths.max()
    valid = np.arange(longest) < lengths[:, None]
    cells = np.flatnonzero(valid)
    grid = np.full(valid.shape, len(cells), np.int32)
    grid[valid] = np.arange(len(cells))
    last = shared + np.cumsum(lengths) - 1
    return Prompts(
        prefix=ids[0, :shared],
        tokens=ids[:, shared : shared + longest][valid],
        positions=(shared + cells % longest).astype(np.int32),
        grid=grid,
        cells=cells.astype(np.int32),
        ends=last.reshape(task.token_ids.shape[:2]).astype(np.int32),
    )


def whole(task: Task) -> Prompts:
    """Lay a task's prompts out token by token, for a text tower that is not causal.

    Args:
        task: the task, its prompts filled up to the model's length.

    Returns:
        The prompts, as numpy arrays, which share nothing and are read at their last token.
    """
    classes, templates, length = task.token_ids.shape
    cells = np.arange(task.token_ids.size, dtype=np.int32)
    return Prompts(
        prefix=np.zeros(0, np.int32),
        tokens=task.token_ids.reshape(-1),
        positions=cells % length,
        grid=cells.reshape(-1, length),
        cells=cells,
        ends=cells[length - 1 :: length].reshape(classes, templates),
    )


@jax.custom_vjp
def take_rows(x: Array, source: Array | np.ndarray, target: Array | np.ndarray) -> Array:
    """Arrange rows anew; the gradient is taken row by row too, where JAX would add up.

    Args:
        x: (rows, …).
        source: the row of `x` that stands at each place, none twice; out of range for zeros.
        target: (rows,) the inverse: the place of each row, out of range if it has none.

    Returns:
        (*source.shape, …).
    """
    del target
    return x.at[source].get(mode="fill", fill_value=0)


def _take_forward(x: Array, source: Array, target: Array) -> tuple[Array, tuple[Array, Array]]:
    return take_rows(x, source, target), (source, target)


def _take_backward(indices: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    source, target = indices
    gradient = gradient.reshape(-1, *gradient.shape[source.ndim :])
    return take_rows(gradient, target, source.reshape(-1)), None, None


take_rows.defvjp(_take_forward, _take_backward)


def packed_attention(prompts: Prompts, causal: bool = True) -> Attend:
    """Attention over the rows of packed prompts, causal or not; zeros for the padding."""
    shared, own = prompts.prefix.shape[0], prompts.tokens.shape[0]
    count, longest = prompts.grid.shape
    full = count * longest == own  # prompts of one length need no gather
    mask = None
    if causal:
        later = np.tril(np.ones((longest, longest), bool))
        mask = np.concatenate([np.ones((longest, shared), bool), later], 1)

    def lay_out(x: Array) -> Array:
        if full:
            return x.reshape(count, longest, *x.shape[1:])
        return take_rows(x, prompts.grid, prompts.cells)

    def attend(query: Array, key: Array, value: Array) -> Array:
        prefix = tuple(x[None, :shared] for x in (query, key, value))
        parts, filling = [], query[shared + own :]
        query, key, value = (lay_out(x[shared : shared + own]) for x in (query, key, value))
        if shared:
            parts = [attention(*prefix, mask=np.tril(np.ones((shared, shared), bool)))[0]]
            key, value = (
                jnp.concatenate([jnp.broadcast_to(p, (count, *p.shape[1:])), x], 1)
                for p, x in zip(prefix[1:], (key, value), strict=True)
            )
        y = attention(query, key, value, mask=mask)
        y = y.reshape(-1, *y.shape[2:])
        if not full:
            y = take_rows(y, prompts.cells, prompts.grid.reshape(-1))
        parts += [y, jnp.zeros_like(filling)][: 1 + (len(filling) > 0)]
        return jnp.concatenate(parts) if len(parts) > 1 else y

    return attend


def read_ends(prompts: Prompts) -> Select:
    """The rows at which prompts are read, (prompts, …); their gradient is a gather too."""
    shared = prompts.prefix.shape[0]
    count, longest = prompts.grid.shape
    ends = prompts.ends.reshape(-1)
    prompt = prompts.cells // longest  # of each row, which stand prompt after prompt
    last = jnp.append(prompt[1:] != prompt[:-1], True)
    nowhere = jnp.full(shared, count), jnp.full(-(shared + len(prompt)) % MULTIPLE, count)
    target = jnp.concatenate([nowhere[0], jnp.where(last, prompt, count), nowhere[1]])
    return lambda x: take_rows(x, ends, target)


def rows(prompts: Prompts) -> tuple[Array, Array]:
    """Token ids and positions of all rows, the prefix's first; zeros up to a multiple of 8."""
    shared = prompts.prefix.shape[0]
    filling = np.zeros(-(shared + prompts.tokens.shape[0]) % MULTIPLE, np.int32)
    ids = jnp.concatenate([prompts.prefix, prompts.tokens, filling])
    return ids, jnp.concatenate([np.arange(shared, dtype=np.int32), prompts.positions, filling])


def over_devices(
    token_ids: Array, positions: Array, attend: Attend, read: Select
) -> tuple[Array, Array, Attend, Select]:
    """Spread the rows over the automatic mesh axis "batch", if one is set and has several devices.

    Attention is spread by heads, which need nothing from each other, all else by rows. Either is
    filled up to a multiple of the devices. Without such an axis nothing changes.

    Args:
        token_ids: (rows,).
        positions: (rows,).
        attend: attention over these rows.
        read: selects some of them.

    Returns:
        The same four for the rows as they are spread; what is read is filled up, too.
    """
    mesh = get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    devices = mesh.shape["batch"] if types.get("batch") == AxisType.Auto else 1
    if devices == 1:
        return token_ids, positions, attend, read
    count = len(token_ids)

    def split(x: Array, axis: int = 0) -> Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, -x.shape[axis] % devices)
        spec = PartitionSpec(*[None] * axis, "batch")
        return jax.lax.with_sharding_constraint(jnp.pad(x, padding), spec)

    def attend_by_head(query: Array, key: Array, value: Array) -> Array:
        heads = query.shape[1]
        y = attend(*(split(x, 1)[:count] for x in (query, key, value)))
        return split(y[:, :heads])

    return split(token_ids), split(positions), attend_by_head, lambda x: split(read(x[:count]))
