"""TNT as an adapter.

The model is unchanged. A frozen map answers with the model's own scale of logits; the paper's
temperature is for the vote of tuned views, and `TNTConfig(temperature="model")` keeps the model's
scale there too. All variants share one state type, so that a frozen map can be updated from time to
time by the online adapter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtta import tree
from jaxtta.adapters.base import (
    Adapter,
    Array,
    Prediction,
    cuts_views,
    image_check,
    require_state,
)
from jaxtta.adapters.image_views import require_one_by_one, require_views
from jaxtta.adapters.tnt.config import TNT_PRESETS, TNTConfig, require_noise
from jaxtta.adapters.tnt.image import initial_noise, tnt_image
from jaxtta.models import Batch, Classifier, Task, as_batch, context_of
from jaxtta.models.checks import require_layout, require_model


class TNTState(NamedTuple):
    """What TNT carries from batch to batch; the same for every variant.

    Attributes:
        noise: (height, width, 3), the map that is updated online, or frozen.
        context: the class embeddings (classes, projection), of unit norm.
        key: data of the PRNG key, which each image's views and first map are drawn from.
        seen: () number of valid images so far.
        fingerprint: () uint32 checksum of the parameters, as in `adapters.State`.
    """

    noise: Array
    context: Array
    key: Array
    seen: Array
    fingerprint: Any = None


@cuts_views
def tnt(
    model: Classifier,
    task: Task | None,
    *,
    config: TNTConfig = TNT_PRESETS["paper"],
    noise: Array | None = None,
) -> Adapter:
    """Optimise a noise map on each image's pixels; stateless unless `config.online`.

    Views are cut from the full-size images where the batch has `sizes`, otherwise from images at
    the model's resolution.

    Args:
        model: a model with cosine logits whose images do not mix, as CLIP.
        task: the classes.
        config: the settings.
        noise: (size, size, 3), the first map of an online adapter, or the frozen one; None for
            noise within the bounds, drawn in `init`.

    Returns:
        The adapter; its logits are log-probabilities. With a frozen map (`steps=0`) and one view
        they are those of the model's own logits for the image with the map on it.

    Raises:
        TypeError: if the model, task, config or map is something else.
        ValueError: if the map has another size than the model's input, the model needs a task and
            there is none, or it lacks what TNT needs.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.tnt(model, task)  # a map for every image
        >>> online = jaxtta.adapters.TNTConfig(online=True)
        >>> adapter = jaxtta.adapters.tnt(model, task, config=online)  # one map along the stream
        >>> noise = adapter.init(params).noise
        >>> frozen = jaxtta.adapters.TNTConfig(views=1, steps=0)
        >>> adapter = jaxtta.adapters.tnt(model, task, config=frozen, noise=noise)  # that map
    """
    require_model(model)
    if not isinstance(config, TNTConfig):
        raise TypeError(f"config is a {type(config).__name__}, expected a TNTConfig")
    for name, meaning in (("logit_scale", "cosine logits"), ("preprocessing", "preprocessing")):
        if not hasattr(model, name):
            raise ValueError(f"TNT needs a model with {meaning}; this one has no {name}")
    require_views(model, "TNT")
    side = model.image_size
    if noise is not None:
        require_noise(noise, (side, side, 3))
    own_map = not config.online and noise is None
    context = context_of(model, task, lambda path: False)
    check_values = image_check()

    def init(params: Any, key: Array | None = None) -> TNTState:
        tree.require_params(params)
        key = jax.random.key(0) if key is None else key
        if noise is None:
            # Not from one of the keys that images have.
            start = initial_noise(jax.random.split(key)[0], side, config.epsilon)
        else:
            start = jnp.array(noise, jnp.float32)
        classes = jax.tree.map(jnp.copy, context(params))
        if not isinstance(classes, jax.Array) or classes.ndim != 2:
            raise ValueError("TNT needs class embeddings (classes, projection) as the context")
        return TNTState(
            start,
            classes,
            jax.random.key_data(key),
            jnp.zeros((), jnp.int32),
            tree.fingerprint(params),
        )

    def step(params: Any, state: TNTState, batch: Batch | Array) -> tuple[TNTState, Prediction]:
        require_state(TNTState, params, state)
        batch = as_batch(batch, state.seen)
        require_layout(batch.images)
        require_one_by_one(batch.images, "TNT")
        check_values(batch.images)
        key = jax.random.wrap_key_data(state.key)

        def one(noise: Array, row: tuple[Any, ...]) -> tuple[Array, tuple[Array, ...]]:
            image, size, index, valid = row
            _, tuned = tnt_image(
                *(model, params, state.context, jax.random.fold_in(key, index), image, size),
                *(config, None if own_map else noise),
            )
            losses = tuned.losses[-1] if config.steps else jnp.zeros(3)
            # The last loss is from before the last update: finite even if the gradient was not.
            finite = jnp.isfinite(losses).all() & jnp.isfinite(tuned.noise).all()
            # An online map is unchanged by padding and by an image whose map is not finite.
            after = jnp.where(valid & finite, tuned.noise, noise)
            return after, (tuned.log_probabilities, losses, finite)

        images = (batch.images, batch.sizes, batch.index, batch.mask)
        if config.online:
            last, (logits, losses, finite) = jax.lax.scan(one, state.noise, images)
        else:
            last = state.noise
            logits, losses, finite = jax.lax.map(
                lambda row: one(state.noise, row)[1],
                images,
                batch_size=min(config.images_per_map, len(batch.images)),
            )
        valid = batch.mask.sum(dtype=jnp.int32)
        # A sum over those that count, so that a NaN in padding stays out.
        losses = jnp.where(batch.mask[:, None], losses, 0).sum(0) / jnp.maximum(valid, 1)
        metrics = {
            "marginal_entropy": losses[0],
            "inter_view": losses[1],
            "loss": losses[2],
            "skipped": (batch.mask & ~finite).any(),
        }
        state = state._replace(noise=last, seen=state.seen + valid)
        return state, Prediction(logits, metrics)

    return Adapter(init, step)
