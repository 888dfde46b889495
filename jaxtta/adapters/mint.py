"""Mint: more variance between the classes of a stream, from a batch at a time.

Unit image embeddings f_i are labelled by zero-shot; m_y is the running mean of those labelled y,
m that of all. One step from the source weights, along the mean of all batches' gradients so far,
raises the variance between classes

    V = Σ_i a_i (‖f_i − m‖² − ‖f_i − m_{y_i}‖²),

in which each class of the batch has the same weight, a_i = 1/(classes · images of the class); m and
m_y have no gradient. The adapted embeddings have running class means m' of their own, which are
mixed into the text: the classes are the unit vectors of (1 − r) t + r m', r = n/(10000 + n) after n
images.

Cost per image: two passes forward and one backward.

References:
    Bao et al., NeurIPS 2025, https://arxiv.org/abs/2510.22127
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxtta import tree
from jaxtta.adapters.base import Adapter, Array, Preset, dot
from jaxtta.adapters.class_sums import ClassSums, members_of, no_images
from jaxtta.adapters.descent import Descent
from jaxtta.adapters.on_features import class_embeddings, unit
from jaxtta.adapters.per_batch import Adapt, choices, per_batch, unit_embeddings
from jaxtta.models import Batch, Classifier, Outputs, Task, as_batch, context_of

MINT_PRESETS: dict[str, Preset] = dict.fromkeys(
    ("cifar10-c", "cifar100-c", "imagenet-c"), Preset(partial(optax.adam, 7e-3), 20)
)
"""The published settings for ViT-B; ViT-L takes 1.5e-2. A first step of Adam is of this size in
every parameter, whatever the size of the gradient."""


class MintMemory(NamedTuple):
    """What Mint remembers of a stream.

    Attributes:
        source: class sums of the embeddings with the source weights.
        adapted: of those with the adapted ones.
        gradient: mean of the batches' gradients so far, of −V.
        batches: () int32, their number.
    """

    source: ClassSums
    adapted: ClassSums
    gradient: Any
    batches: Array


def mint_inter_variance(features: Array, members: Array, means: Array, mean: Array) -> Array:
    """Variance between the classes of a batch, each of the same weight.

    Args:
        features: (batch, projection), of unit norm.
        members: (batch, classes) bool, each image's class; padding is of none.
        means: (classes, projection), class means.
        mean: (projection,), mean of all images.

    Returns:
        A scalar, 0 without images.
    """
    rows = members.astype(features.dtype)
    counts = rows.sum(0)
    weights = dot(rows, 1 / jnp.maximum(counts, 1)) / jnp.maximum((counts > 0).sum(), 1)
    around_all, around_own = ((features - x) ** 2 for x in (mean, dot(rows, means)))
    return (weights * (around_all - around_own).sum(-1)).sum()


def mint_adaptation(model: Classifier, optimizer: optax.GradientTransformation) -> Adapt:
    """Adapt to a batch along the mean gradient of the stream.

    Args:
        model: any classifier; its own context is the method's.
        optimizer: takes one first step.

    Returns:
        `adapt(params, start, context, memory, batch)`, the memory a `MintMemory`.
    """

    def adapt(
        params: Any, start: Any, context: Any, memory: MintMemory, batch: Batch
    ) -> tuple[Descent, MintMemory]:
        mask = jnp.asarray(batch.mask)

        def loss_of(adapted: Any) -> tuple[Array, ClassSums]:
            outputs = model(tree.merge(params, adapted), context, batch)
            features, members = unit_embeddings(outputs, mask), members_of(outputs.logits, mask)
            sums = memory.source.add(features, members)
            return -mint_inter_variance(features, members, sums.means, sums.mean), sums

        (loss, sums), gradient = jax.value_and_grad(loss_of, has_aux=True)(start)
        batches = memory.batches + 1
        mean = jax.tree.map(lambda old, new: old + (new - old) / batches, memory.gradient, gradient)
        updates, _ = optimizer.update(mean, optimizer.init(start), start)
        descent = Descent(optax.apply_updates(start, updates), loss)
        return descent, MintMemory(sums, memory.adapted, mean, batches)

    return adapt


def mint(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trainable: tree.Trainable | None = None,
    prior: float = 10_000.0,
    scale: float | None = None,
) -> Adapter:
    """Move the image tower so that the classes of the stream are further apart.

    Each batch starts from the source weights; means and gradient run along the stream. A batch may
    have one image. Batch norms use each batch's own statistics.

    Args:
        model: a classifier with class embeddings and cosine logits, as CLIP.
        task: the classes; the published runs average seven templates.
        optimizer: an optax transformation, of which every batch takes a first step; None for
            `MINT_PRESETS["imagenet-c"]`.
        trainable: which parameters of the image tower to adapt, a predicate on paths; None for
            `normalisation_parameters("image")`.
        prior: images after which the stream's class means weigh as much as the text.
        scale: of the cosines in the prediction; None for the model's own. The reference
            implementation's 100 is CLIP's.

    Returns:
        The adapter; `metrics["loss"]` is −V. `State.memory` is a `MintMemory`.

    Raises:
        TypeError: if the model, task, optimizer or trainable is something else.
        ValueError: if the prior is not positive, the model needs a task and there is none, or it
            has no cosine logits; in `init`, if it has no class embeddings, or no parameter is
            chosen, or one of the text tower.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.mint(model, task)
        >>> state = adapter.init(params)
    """
    if not prior > 0:
        raise ValueError(f"prior is {prior}, expected a positive number of images")
    given = optimizer, trainable, MINT_PRESETS["imagenet-c"]
    model, optimizer, trainable = choices("Mint", model, *given)
    scale_of = cast(Any, model).logit_scale

    def remember(params: Any, start: Any, context: Any) -> MintMemory:
        images = jnp.zeros((1, model.image_size, model.image_size, 3), jnp.uint8)
        outputs = jax.eval_shape(model, params, context, as_batch(images))
        like = class_embeddings(outputs, "Mint").shape, outputs.embeddings.dtype
        gradient = jax.tree.map(jnp.zeros_like, start)
        return MintMemory(no_images(*like), no_images(*like), gradient, jnp.int32(0))

    def predict(
        params: Any, context: Any, memory: MintMemory, batch: Batch
    ) -> tuple[Outputs, MintMemory]:
        outputs = model(params, context, batch)
        texts = class_embeddings(outputs, "Mint")
        finite = jnp.asarray(batch.mask) & jnp.isfinite(outputs.embeddings).all(-1)
        clean, members = unit_embeddings(outputs, finite), members_of(outputs.logits, finite)
        sums = memory.adapted.add(clean, members)
        images = memory.source.counts.sum().astype(texts.dtype)
        share = images / (prior + images)
        classes = unit((1 - share) * texts + share * sums.means)
        factor = scale_of(params) if scale is None else scale
        logits = factor * dot(unit(outputs.embeddings), classes.T)
        return outputs._replace(logits=logits), memory._replace(adapted=sums)

    context = context_of(model, task, lambda path: False)
    adapt = mint_adaptation(model, optimizer)
    known = {"kinds": (object, MintMemory), "method": "Mint"}
    return per_batch(adapt, predict, context, trainable, remember=remember, **known)
