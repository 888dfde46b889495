"""RoTTA's memory: images of all classes alike, of little age and uncertainty.

A class has room for its share of the memory. An image of a class with room enters; where the memory
is full, it competes with the images of the largest classes, and where its class is, with those of
its class. The one with the highest score, with age a, uncertainty u and N places,

    λ_t/(1 + e^{−a/N}) + λ_u u/log C,

goes if its score is above the newcomer's; otherwise the newcomer is dropped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.models import Batch

Array = jax.Array


class Bank(NamedTuple):
    """What is known of the images in the memory; every field is (places,), or () for one image.

    Attributes:
        label: predicted class; −1 where there is no image.
        age: number of images that came since.
        uncertainty: entropy of its prediction, in nats.
        arrival: number of the image among all that came, valid ones alone.
        index: number of the image in its stream.
        row: number of the image in the batch that it came with; −1 for earlier batches.
    """

    label: Array
    age: Array
    uncertainty: Array
    arrival: Array
    index: Array
    row: Array


class RoTTAMemory(NamedTuple):
    """What RoTTA remembers.

    Attributes:
        teacher: θ̄, a tree of the adapted parameters.
        bank: what is known of the images.
        images: (places, height, width, 3), float in [0, 1].
        key: data of the PRNG key, which views are drawn from.
    """

    teacher: Any
    bank: Bank
    images: Array
    key: Array


def empty_bank(places: int, dtype: jax.typing.DTypeLike) -> Bank:
    """A memory without images."""
    label, index, row = (jnp.full(places, -1, jnp.int32) for _ in range(3))
    age, arrival = (jnp.zeros(places, jnp.int32) for _ in range(2))  # a donated state has no twins
    return Bank(label, age, jnp.zeros(places, dtype), arrival, index, row)


def enter(
    bank: Bank,
    image: Bank,
    valid: Array,
    classes: int,
    timeliness: float = 1.0,
    certainty: float = 1.0,
) -> Bank:
    """Let one image enter the memory, or not.

    Args:
        bank: the memory.
        image: what is known of the image, scalars; its age is 0.
        valid: () whether it is an image; if not, nothing changes.
        classes: how many there are.
        timeliness: λ_t.
        certainty: λ_u.

    Returns:
        The memory, one image older. Of equal scores the last in order of class and arrival goes.
    """
    places = len(bank.label)
    there, own = bank.label >= 0, bank.label == image.label

    def score(of: Bank) -> Array:
        old = jax.nn.sigmoid((of.age / places).astype(of.uncertainty.dtype))
        return timeliness * old + certainty * of.uncertainty / np.log(classes)

    occupancy = (there & (bank.label == bank.label[:, None])).sum(1)
    occupancy = jnp.where(there, occupancy, 0)
    room = own.sum() < places / classes
    rivals = jnp.where(room, there & (occupancy == occupancy.max()), own)
    scores = jnp.where(rivals, score(bank), -jnp.inf)
    # The last of an order, not those equal to the greatest: XLA may round a copy differently.
    worst = jnp.lexsort((bank.arrival, bank.label, scores))[-1]
    replaces = scores[worst] > score(image)
    goes_in = room & ~there.all()
    slot = jnp.where(goes_in, there.argmin(), worst)
    here = valid & (goes_in | replaces) & (jnp.arange(places) == slot)
    bank = jax.tree.map(lambda kept, new: jnp.where(here, new, kept), bank, image)
    return bank._replace(age=bank.age + (valid & (bank.label >= 0)))


def newcomers_of(logits: Array, batch: Batch, arrival: Array) -> Bank:
    """What is known of a batch's images, from the logits (batch, classes); all are of age 0."""
    p, count = jax.nn.softmax(logits), len(logits)
    return Bank(
        p.argmax(-1).astype(jnp.int32),
        jnp.zeros(count, jnp.int32),
        -(p * jnp.log(p + 1e-6)).sum(-1),
        arrival,
        jnp.asarray(batch.index, jnp.int32),
        jnp.arange(count, dtype=jnp.int32),
    )


def fill_bank(
    bank: Bank,
    images: Array,
    newcomers: Bank,
    pixels: Array,
    valid: Array,
    classes: int,
    **weights: float,
) -> tuple[Bank, Array]:
    """Let the images of a batch enter the memory one after another.

    Args:
        bank: what is known of the images in the memory.
        images: (places, height, width, 3), they themselves.
        newcomers: what is known of those of the batch.
        pixels: (batch, height, width, 3), they themselves.
        valid: (batch,) bool, which of them come.
        classes: how many there are.
        **weights: λ_t and λ_u, as in `enter`.

    Returns:
        The bank and the images.
    """

    def one(bank: Bank, row: tuple[Bank, Array]) -> tuple[Bank, None]:
        return enter(bank, *row, classes, **weights), None

    bank = bank._replace(row=jnp.full_like(bank.row, -1))
    bank, _ = jax.lax.scan(one, bank, (newcomers, valid))
    new = (bank.row >= 0)[:, None, None, None]  # the pixels move once, not at every newcomer
    return bank._replace(row=jnp.full_like(bank.row, -1)), jnp.where(new, pixels[bank.row], images)
