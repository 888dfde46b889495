"""TNT: a small noise map on one image's pixels, tuned until its views agree.

    adapter = tnt(model, task)                        # a map of its own for every image
    adapter = tnt(model, task, Tuning(steps=3))
    adapter = tnt(model, task, Tuning(carry=True))    # one map for an environment
    adapter = tnt(model, task, Tuning(steps=0), noise=noise)  # that map, frozen

The model stays as it is. The states of all of these are alike, so that a frozen map can be
refreshed from time to time by stepping the carrying adapter.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta import views as cut
from jaxtta.adapters.base import Adapter, Array, Prediction
from jaxtta.augmix import augmix
from jaxtta.losses import entropy
from jaxtta.models import CLIP, Task, unit
from jaxtta.objectives.base import Batch, as_batch


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How TNT tunes and votes.

    Attributes:
        views: N, the views of an image; the first is the plain preprocessing.
        steps: updates of the map; 0 to apply it as it is.
        learning_rate: size of an update.
        epsilon: the map's greatest magnitude, in [0, 1] pixel values.
        select_fraction: share of the views, those of lowest entropy, that the loss is taken over.
        vote_fraction: share of the views that vote.
        entropy_weight: of the marginal entropy in the loss (the published code's default is 0.1).
        temperature: of the vote: a number on the cosines, or "code" for what the published code
            does in half precision.
        scale: least and greatest share of a random crop's area.
        ratio: least and greatest width over height of a random crop.
        augmix: severity of AugMix on the random crops, up to 10; 0 for none, as published.
        carry: go on with one map along the stream, image by image.
        chunk: how many views of an image are embedded at once where no gradient is taken; fewer
            need less memory. With gradient it is those that the loss is taken over.
        images_per_map: how many images are mapped over at once; 1 on a CPU, more fill an accelerator.
    """

    views: int = 64
    steps: int = 1
    learning_rate: float = 1e-3
    epsilon: float = 1 / 255
    select_fraction: float = 0.1
    vote_fraction: float = 0.1
    entropy_weight: float = 1.0
    temperature: float | Literal["code"] = 7e-3
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augmix: float = 0.0
    carry: bool = False
    chunk: int = 8
    images_per_map: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, least in (("views", 1), ("steps", 0), ("chunk", 1), ("images_per_map", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("select_fraction", "vote_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0 and at most 1")
        for name, greatest in (("scale", 1), ("ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= greatest:
                limits = " at most 1" if greatest == 1 else ""
                raise ValueError(
                    f"{name} is {low} to {high}, expected positive numbers in order{limits}"
                )
        if not 0 <= self.augmix <= 10:
            raise ValueError(f"augmix is {self.augmix}, expected 0 to 10")
        named = isinstance(self.temperature, str)
        if self.temperature != "code" if named else not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}, expected a positive number or code"
            )


TNT_PRESETS = {"paper": Tuning(), "code": Tuning(entropy_weight=0.1, temperature="code")}
"""The published settings: those of the paper, and the published code's defaults."""


PIL_KERNELS = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the kernels that views can be resized with."""


class Tuned(NamedTuple):
    """What TNT made of one image.

    Attributes:
        noise: (height, width, 3), the tuned map.
        log_probabilities: (classes,) of the vote.
        noise_steps: (steps, height, width, 3), the map after each step.
        losses: (steps, 3): marginal entropy, distance between views, their weighted sum.
        selected: (K,) the views that the loss was taken over.
        voting: (V,) the views that voted.
        logits: (N, classes) of the views with the tuned map.
    """

    noise: Array
    log_probabilities: Array
    noise_steps: Array
    losses: Array
    selected: Array
    voting: Array
    logits: Array


Embed = Callable[[Any, Array], Array]


def tune(
    embed: Embed,
    params: Any,
    classes: Array,
    scale: Array,
    views: Array,
    noise: Array,
    tuning: Tuning,
    select: bool = True,
) -> Tuned:
    """Tune a noise map on the views of one image, and vote.

    Args:
        embed: `embed(params, images in [0, 1])` to embeddings (views, projection).
        params: of the model.
        classes: (classes, projection), normalised embeddings of the texts.
        scale: () the model's logit scale, exponentiated.
        views: (N, height, width, 3) in [0, 1].
        noise: (height, width, 3), the map to begin with.
        tuning: the settings.
        select: differentiate through the selected views alone; the result is the same, and the
            backward pass N/K times smaller, where K views are selected.

    Returns:
        The tuned map and its prediction.

    Raises:
        ValueError: if views and map differ in size.

    References:
        https://arxiv.org/abs/2502.06019
    """
    if views.shape[1:] != noise.shape:
        raise ValueError(f"a noise map of shape {noise.shape} for views of {views.shape[1:]}")

    def embeddings(views: Array, noise: Array) -> Array:
        return unit(embed(params, _clip(views + noise)))

    def logits_of(embedded: Array) -> Array:
        # As CLIP's own cosines: the vote divides them by a small temperature.
        return scale * jnp.matmul(embedded, classes.T, precision="highest")

    def logits_of_all(noise: Array) -> Array:
        return logits_of(_in_chunks(lambda part: embeddings(part, noise), views, tuning.chunk))

    count = len(views)
    kept, votes = (_share(f, count) for f in (tuning.select_fraction, tuning.vote_fraction))
    selected = jnp.arange(0)
    losses, noise_steps = jnp.zeros((0, 3)), jnp.zeros((0, *noise.shape))
    if tuning.steps:
        selected = _surest(logits_of_all(noise), kept)
        chosen = views[selected] if select else views

        def loss(noise: Array) -> tuple[Array, Array]:
            embedded = embeddings(chosen, noise)
            embedded = embedded if select else embedded[selected]
            terms = marginal_entropy(logits_of(embedded)), inter_view_distance(embedded)
            total = tuning.entropy_weight * terms[0] + terms[1]
            return total, jnp.stack([*terms, total])

        def update(noise: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            gradient, terms = jax.grad(loss, has_aux=True)(noise)
            noise = noise - tuning.learning_rate * jnp.sign(gradient)
            noise = noise.clip(-tuning.epsilon, tuning.epsilon)
            return noise, (terms, noise)

        noise, (losses, noise_steps) = jax.lax.scan(update, noise, length=tuning.steps)
    logits = logits_of_all(noise)
    voting = _surest(logits, votes)
    temperature = tuning.temperature
    if temperature == "code":  # half precision's epsilon, and the entropy that the code adds to it
        temperature = 2.0**-10 * (1 + marginal_entropy(logits))
    probabilities = jax.nn.log_softmax(logits[voting] / scale / temperature)
    log_probabilities = jax.nn.logsumexp(probabilities, 0) - jnp.log(votes)
    return Tuned(noise, log_probabilities, noise_steps, losses, selected, voting, logits)


def _in_chunks(function: Callable[[Array], Array], rows: Array, chunk: int) -> Array:
    """Apply a function of rows to at most `chunk` of them at a time."""
    count = -(-len(rows) // chunk)
    if count == 1:
        return function(rows)
    size = -(-len(rows) // count)  # all chunks as even as can be, so that few rows are padding
    padded = jnp.pad(rows, ((0, count * size - len(rows)), *((0, 0),) * (rows.ndim - 1)))
    parts = jax.lax.map(function, padded.reshape(count, size, *rows.shape[1:]))
    return parts.reshape(count * size, *parts.shape[2:])[: len(rows)]


def _share(fraction: float, count: int) -> int:
    return max(int(fraction * count), 1)


def _surest(logits: Array, count: int) -> Array:
    return jnp.argsort(entropy(logits))[:count]


def _clip(x: Array) -> Array:
    # Unlike jnp.clip's, the derivative is 1 at the ends too, where many pixels lie.
    return jnp.where((x >= 0) & (x <= 1), x, jax.lax.stop_gradient(x.clip(0, 1)))


def marginal_entropy(logits: Array) -> Array:
    """Entropy in nats of the mean probability over views (views, classes)."""
    mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), 0) - jnp.log(len(logits))
    return -(jnp.exp(mean) * mean).sum()


def inter_view_distance(embeddings: Array) -> Array:
    """Mean Euclidean distance between pairs of different embeddings (views, projection).

    Args:
        embeddings: (views, projection), normalised.

    Returns:
        A scalar; 0 where all are equal, or there is only one.
    """
    first, second = np.triu_indices(len(embeddings), 1)
    squared = ((embeddings[first] - embeddings[second]) ** 2).sum(-1)
    apart = squared > 0
    distances = jnp.sqrt(jnp.where(apart, squared, 1.0))  # a root of 0 has no derivative
    return jnp.where(apart, distances, 0).sum() / jnp.maximum(apart.sum(), 1)


def tune_image(
    model: CLIP,
    params: Any,
    classes: Array,
    key: Array,
    image: Array,
    size: Array | None = None,
    tuning: Tuning = Tuning(),
    noise: Array | None = None,
) -> tuple[Array, Tuned]:
    """Cut an image's views, tune a noise map on them, and vote.

    Args:
        model: the model.
        params: its parameters.
        classes: (classes, projection), normalised embeddings of the texts.
        key: PRNG key of this image.
        image: (height, width, 3), uint8 or float in [0, 1].
        size: (2,) true height and width where the image is an original on a canvas; None where
            it has the model's resolution.
        tuning: the settings.
        noise: (size, size, 3), the map to begin with; None for noise within the bounds.

    Returns:
        The views (N, size, size, 3) without noise, the plain one first, and what was made of them.
    """
    preprocessing = model.preprocessing
    side, kernel = preprocessing.image_size, PIL_KERNELS[preprocessing.resample]
    noise_key, view_key, mix_key = jax.random.split(key, 3)
    start = initial_noise(noise_key, side, tuning.epsilon) if noise is None else noise
    if size is None and image.shape[:2] != (side, side):
        raise ValueError(
            f"an image of {image.shape[0]}×{image.shape[1]} pixels, expected {side}×{side}, "
            "or an original with its size"
        )
    original = image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image
    if size is None:
        first, size = original, jnp.array(original.shape[:2])
    else:
        first = cut.plain(original, size, side, preprocessing.resize, kernel)
    others = cut.random_resized_crops(
        view_key, original, size, tuning.views - 1, side, tuning.scale, tuning.ratio
    )
    if tuning.augmix:
        keys = jax.random.split(mix_key, len(others))
        others = jax.vmap(augmix, (0, 0, None))(keys, others, tuning.augmix)
    views = jnp.concatenate([first[None], others])

    def embed(params: Any, images: Array) -> Array:
        return model.encode_image(params, model.normalize(images))

    return views, tune(embed, params, classes, jnp.exp(params["logit_scale"]), views, start, tuning)


def initial_noise(key: Array, side: int, epsilon: float) -> Array:
    """Draw the map to begin with, (side, side, 3): normal noise, clipped to its bounds."""
    return jax.random.normal(key, (side, side, 3)).clip(-epsilon, epsilon)


class TNTState(NamedTuple):
    """What TNT carries.

    Attributes:
        noise: (height, width, 3), the map of a carrying or frozen adapter.
        classes: (classes, projection), normalised embeddings of the texts.
        key: data of the PRNG key, which each image's views and first map are drawn from.
        seen: () number of valid images so far.
    """

    noise: Array
    classes: Array
    key: Array
    seen: Array


def tnt(
    model: CLIP, task: Task, tuning: Tuning = TNT_PRESETS["paper"], noise: Array | None = None
) -> Adapter:
    """Tune a noise map on each image's pixels; nothing is carried over unless asked for.

    A batch with `sizes` holds originals on a canvas, and the views are cut from them; without, its
    images have the model's resolution already, and so do the views' originals.

    Args:
        model: the model.
        task: the classes.
        tuning: the settings.
        noise: (size, size, 3), the map to begin with where it is carried or frozen; None for
            noise within the bounds, drawn in `init`.

    Returns:
        The adapter; its logits are log-probabilities.

    Raises:
        ValueError: if the map has another size than the model's input.

    References:
        https://arxiv.org/abs/2502.06019
    """
    side = model.preprocessing.image_size
    if model.preprocessing.resample not in PIL_KERNELS:
        raise ValueError(
            f"the checkpoint resizes with PIL's filter {model.preprocessing.resample}, expected 2 "
            "(bilinear) or 3 (bicubic)"
        )
    if noise is not None and jnp.shape(noise) != (side, side, 3):
        raise ValueError(
            f"a noise map of shape {jnp.shape(noise)}, expected {(side, side, 3)} for this model"
        )
    own_map = not tuning.carry and noise is None
    prompts, encode = model.prompts(task), jax.jit(model.class_embeddings)

    def init(params: Any, key: Array | None = None) -> TNTState:
        key = jax.random.key(0) if key is None else key
        if noise is None:
            # Not from one of the keys that images have.
            start = initial_noise(jax.random.split(key)[0], side, tuning.epsilon)
        else:
            start = jnp.array(noise, jnp.float32)
        return TNTState(
            start, encode(params, prompts), jax.random.key_data(key), jnp.zeros((), jnp.int32)
        )

    def step(params: Any, state: TNTState, batch: Batch | Array) -> tuple[TNTState, Prediction]:
        batch = as_batch(batch, state.seen)
        key = jax.random.wrap_key_data(state.key)

        def one(noise: Array, row: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
            image, size, index, valid = row
            _, tuned = tune_image(
                *(model, params, state.classes, jax.random.fold_in(key, index), image, size),
                *(tuning, None if own_map else noise),
            )
            losses = tuned.losses[-1] if tuning.steps else jnp.zeros(3)
            # The last loss is from before the last update: a gradient can be NaN and it not.
            finite = jnp.isfinite(losses).all() & jnp.isfinite(tuned.noise).all()
            # A carried map forgets an image that was padding, or gave no finite map.
            after = jnp.where(valid & finite, tuned.noise, noise)
            return after, (tuned.log_probabilities, losses, finite)

        images = (batch.images, batch.sizes, batch.index, batch.mask)
        if tuning.carry:
            last, (logits, losses, finite) = jax.lax.scan(one, state.noise, images)
        else:
            last = state.noise
            logits, losses, finite = jax.lax.map(
                lambda row: one(state.noise, row)[1],
                images,
                batch_size=min(tuning.images_per_map, len(batch.images)),
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


def save_noise(path: str | Path, noise: Array, tuning: Tuning) -> None:
    """Save an environment's map with the settings that it was tuned with.

    Args:
        path: of the `.safetensors` file.
        noise: (height, width, 3).
        tuning: the settings, kept as JSON in the file's metadata.
    """
    from safetensors.numpy import save_file

    metadata = {"tuning": json.dumps(dataclasses.asdict(tuning))}
    temporary = Path(path).with_name(f".{Path(path).name}")
    save_file({"noise": np.asarray(noise, np.float32)}, str(temporary), metadata)
    temporary.replace(path)  # whole or not at all


def load_noise(path: str | Path) -> tuple[np.ndarray, Tuning]:
    """Load what `save_noise` saved.

    Args:
        path: of the file.

    Returns:
        The map (height, width, 3) and its settings.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no noise map.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(str(path), "np") as file:
            settings = dict(json.loads(file.metadata()["tuning"]))
            noise = file.get_tensor("noise")
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return noise, Tuning(**settings)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: holds no noise map ({error})") from error
