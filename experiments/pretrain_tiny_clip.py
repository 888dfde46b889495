r"""Train a small CLIP from scratch on a folder of images.

    python experiments/pretrain_tiny_clip.py --train cifar10/train --test cifar10/test \
        --output runs/tiny-clip

The folder contains one subfolder of images per class, named after the class. The text tower turns
the names into a classifier, and both towers are trained with the cross-entropy of its predictions.
Augmentation is limited to crops, flips and CutMix, because a model for test-time adaptation to
corruptions must not be trained on them. The result is an ordinary transformers checkpoint.
"""

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPConfig

from jaxtta import models
from jaxtta.assets import MODEL
from jaxtta.cli import run_script
from jaxtta.data import UnreadableImageError, image_folder, open_image

Array = jax.Array

TEST_TEMPLATE = "a photo of a {}."
TEMPLATES = (
    TEST_TEMPLATE,
    "a photo of the {}.",
    "a photo of one {}.",
    "a photo of my {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a good photo of a {}.",
    "a good photo of the {}.",
    "a bad photo of a {}.",
    "a close photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "an image of the {}.",
    "this is a {}.",
    "a {}.",
    "{}",
)
FIRST_LOGIT_SCALE, HIGHEST_LOGIT_SCALE = math.log(1 / 0.07), math.log(100)  # CLIP's own


@dataclasses.dataclass(frozen=True)
class Tower:
    """Size of a transformer; its MLPs are four times as wide as its tokens."""

    layers: int
    """Number of blocks."""
    width: int
    """Size of a token."""
    heads: int
    """Number of attention heads, a divisor of the width."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small CLIP from scratch on a folder of images, and write a checkpoint."""

    train: Path
    """Training images, FOLDER/<class>/<any name>.jpg or .png; classes are named after
    their folders, with underscores for spaces."""
    test: Path | None = None
    """Test images in the same layout and with the same classes; test accuracy with the prompt
    "a photo of a {}." is computed after every epoch."""
    output: Path = Path("runs/tiny-clip")
    """Folder for the checkpoint, training.json and training.png, written after every epoch."""
    overwrite: bool = False
    """Replace an existing checkpoint in the output folder."""
    tokenizer: Path = MODEL
    """Folder with a CLIP tokenizer (vocab.json, merges.txt, tokenizer_config.json); it sets the
    text tower's vocabulary. The default one has few words; other words are split into
    characters."""
    limit: int | None = None
    """Use at most this many images of each folder, balanced over the classes."""

    epochs: int = 60
    """Number of passes over the training images."""
    batch: int = 128
    """Images per step."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW, with cosine decay to 0."""
    warmup: float = 0.05
    """Fraction of steps for linear warm-up of the learning rate."""
    weight_decay: float = 0.05
    """Weight decay of AdamW, on matrices only."""
    clip_norm: float = 1.0
    """Maximum gradient norm."""
    label_smoothing: float = 0.1
    """Amount of label smoothing."""
    padding: int = 4
    """Black pixels of padding on each side before the random crop."""
    cutmix: float = 0.5
    """Fraction of the images augmented with CutMix."""
    seed: int = 0
    """Random seed; the same seed gives the same model."""

    vision: Tower = Tower(layers=6, width=192, heads=3)
    """The image tower."""
    text: Tower = Tower(layers=3, width=128, heads=4)
    """The text tower."""
    embedding: int = 128
    """Size of the joint embedding space."""
    image_size: int = 32
    """Side of the model's input in pixels; images are resized to it."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    text_length: int = 32
    """Maximum number of tokens in a prompt."""

    debug: bool = False
    """Show the traceback of an error."""


class Images(NamedTuple):
    """Decoded images.

    Attributes:
        images: (images, height, width, 3) uint8.
        labels: (images,) integers.
        class_names: one name a class.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


class State(NamedTuple):
    """What a training step changes.

    Attributes:
        params: the model's parameters.
        optimizer: the optimiser's state.
        step: steps taken.
    """

    params: dict
    optimizer: optax.OptState
    step: Array


class History(NamedTuple):
    """Metrics of the epochs so far, one value per epoch.

    Attributes:
        loss: mean training loss.
        train_accuracy: on the augmented images; for mixed ones, against the dominant class.
        test_accuracy: empty without test images.
    """

    loss: list[float]
    train_accuracy: list[float]
    test_accuracy: list[float]


TrainStep = Callable[[State, Array, np.ndarray, np.ndarray], tuple[State, tuple[Array, Array]]]
Accuracy = Callable[[dict, Images], float]


def run(config: Config) -> None:
    """Train and write the results after every epoch."""
    check(config)
    model = make_model(config)
    train = read_images(config.train, model, config.limit, config.seed)
    test = config.test and read_images(config.test, model, config.limit, config.seed)
    if test and test.class_names != train.class_names:
        raise ValueError(f"{config.test}: has other classes than {config.train}")
    if len(train.labels) < config.batch:
        raise ValueError(
            f"a batch of {config.batch} is larger than the {len(train.labels)} training images"
        )
    optimizer = make_optimizer(config, config.epochs * (len(train.labels) // config.batch))
    train_step = make_train_step(config, model, optimizer, train.class_names)
    accuracy = make_accuracy(config, model, train.class_names)

    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(init_key)
    params["logit_scale"] = jnp.float32(FIRST_LOGIT_SCALE)
    state = State(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    history = History([], [], [])
    for epoch in range(config.epochs):
        state = train_epoch(config, train_step, state, train_key, train, epoch, history)
        if test:
            history.test_accuracy.append(accuracy(state.params, test))
        write(config, model, state.params, history)
        print(f"epoch {epoch + 1}/{config.epochs}: {summary(history)}")
    print(f"{config.output} holds the checkpoint: {summary(history)}")


def check(config: Config) -> None:
    """Validate the settings.

    Raises:
        ValueError: for invalid settings.
        FileExistsError: if the output folder has a checkpoint and overwrite is false.
    """
    settings = dict(vars(config))
    for name in ("vision", "text"):
        settings |= {f"{name}.{key}": value for key, value in vars(settings[name]).items()}
    for name, value in settings.items():
        if type(value) not in (int, float):
            continue
        flag = "--" + name.replace("_", "-")
        if name in ("warmup", "cutmix", "label_smoothing"):
            if not 0 <= value <= 1:
                raise ValueError(f"{flag} must lie between 0 and 1, not {value}")
        elif name in ("seed", "padding", "weight_decay"):
            if not value >= 0:
                raise ValueError(f"{flag} must not be negative, but is {value}")
        elif not value > 0:
            raise ValueError(f"{flag} must be positive, not {value}")
    for name in ("vision", "text"):
        if settings[f"{name}.width"] % settings[f"{name}.heads"]:
            raise ValueError(f"--{name}.heads must divide --{name}.width")
    written = ("config.json", "model.safetensors")
    if not config.overwrite and any((config.output / name).exists() for name in written):
        raise FileExistsError(
            f"{config.output}: already has a checkpoint; use --overwrite to replace it"
        )


def make_model(config: Config) -> models.CLIP:
    """Make the model for the tokenizer's vocabulary."""
    if not config.tokenizer.is_dir():
        raise FileNotFoundError(f"{config.tokenizer}: no such tokenizer folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    except Exception as error:  # transformers and tokenizers may raise any exception
        raise ValueError(
            f"{config.tokenizer}: no readable tokenizer, expected vocab.json, "
            "merges.txt and tokenizer_config.json"
        ) from error

    def tower(size: Tower) -> dict:
        return {
            "num_hidden_layers": size.layers,
            "hidden_size": size.width,
            "intermediate_size": 4 * size.width,
            "num_attention_heads": size.heads,
            "hidden_act": "quick_gelu",
        }

    vision = {"image_size": config.image_size, "patch_size": config.patch_size}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.text_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = models.from_config(
        CLIPConfig(
            projection_dim=config.embedding,
            vision_config={**tower(config.vision), **vision},
            text_config={**tower(config.text), **text},
        )
    )
    return dataclasses.replace(model, source=str(config.tokenizer))


def read_images(root: Path, model: models.CLIP, limit: int | None, seed: int) -> Images:
    """Decode a folder's images at the model's resolution; unreadable ones are skipped."""
    folder = image_folder(root)
    chosen = balanced(folder.labels, limit or len(folder.labels), seed)
    side = model.preprocessing.image_size
    images = np.empty((len(chosen), side, side, 3), np.uint8)
    readable = np.ones(len(chosen), bool)
    for row, index in enumerate(tqdm(chosen, desc=f"reading {root}", unit="images")):
        try:
            images[row] = model.preprocess([open_image(folder.files[index])])[0]
        except UnreadableImageError as error:
            readable[row] = False
            tqdm.write(f"Skipped {error}", file=sys.stderr)
    if not readable.all():
        print(f"{root}: unreadable images skipped: {(~readable).sum()}", file=sys.stderr)
    labels = folder.labels[chosen][readable]
    for label, name in enumerate(folder.class_names):
        if not (labels == label).any():
            raise ValueError(f"{root / name}: none of the selected images is readable")
    return Images(images[readable], labels, folder.class_names)


def balanced(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Sample images at random, balanced over the classes."""
    classes = np.unique(labels)
    if limit < len(classes):
        raise ValueError(f"a limit of {limit} is less than the {len(classes)} classes")
    rng = np.random.default_rng(seed)
    turn = np.empty(len(labels), int)
    for label in classes:
        members = np.flatnonzero(labels == label)
        turn[members] = rng.permutation(len(members))
    return np.argsort(turn, kind="stable")[:limit]


def augment(
    key: Array, images: Array, targets: Array, padding: int, cutmix_share: float
) -> tuple[Array, Array]:
    """Crop, flip and mix a batch.

    Args:
        key: PRNG key.
        images: (batch, height, width, 3) uint8.
        targets: (batch, classes), probabilities.
        padding: black pixels around an image that a crop may reach.
        cutmix_share: share of the images that are mixed.

    Returns:
        Images and targets of the same shapes.
    """
    crop_key, flip_key, mix_key = jax.random.split(key, 3)
    padded = jnp.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * padding + 1)
    images = jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
    )(padded, corners)
    flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)
    return cutmix(mix_key, images, targets, cutmix_share)


def cutmix(key: Array, images: Array, targets: Array, share: float) -> tuple[Array, Array]:
    """Paste a random rectangle of the next image into a share of the images.

    References:
        Yun et al. 2019, https://arxiv.org/abs/1905.04899
    """
    batch, side = images.shape[:2]
    which_key, area_key, centre_key = jax.random.split(key, 3)
    mixed = jax.random.bernoulli(which_key, share, (batch, 1))
    # The area is uniform, as of Beta(1, 1), until the image's border cuts the rectangle.
    extent = mixed * side * jnp.sqrt(jax.random.uniform(area_key, (batch, 1)))
    centre = jax.random.uniform(centre_key, (2, batch, 1), maxval=side)
    rows, columns = jnp.abs(jnp.arange(side) + 0.5 - centre) < extent / 2
    pasted = rows[:, :, None] & columns[:, None, :]
    part = pasted.mean((1, 2))[:, None]
    # Batches are in random order, so the next image is a random one.
    images = jnp.where(pasted[..., None], jnp.roll(images, 1, 0), images)
    return images, (1 - part) * targets + part * jnp.roll(targets, 1, 0)


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay, gradient clipping and CLIP's second beta."""
    learning_rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, int(config.warmup * (steps - 1)), steps
    )

    def matrices(params: dict) -> dict:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate, b2=0.98, weight_decay=config.weight_decay, mask=matrices),
    )


def make_train_step(
    config: Config,
    model: models.CLIP,
    optimizer: optax.GradientTransformation,
    class_names: tuple[str, ...],
) -> TrainStep:
    """Make the jitted `step(state, key, images, labels) -> (state, (loss, accuracy))`."""
    task = models.zero_shot_task(model, class_names, TEMPLATES)
    model.prompts(task)  # raises if a prompt is too long for the model
    # Padded rather than packed prompts: the templates share one shape and so one program.
    token_ids = jnp.asarray(task.token_ids)

    def loss_of(params: dict, key: Array, images: Array, targets: Array) -> tuple[Array, Array]:
        template = jax.random.randint(key, (), 0, len(TEMPLATES))
        classes = models.l2_normalize(model.encode_text(params, token_ids[:, template]))
        logits = model(params, classes, images).logits
        correct = logits.argmax(-1) == targets.argmax(-1)
        targets = optax.smooth_labels(targets, config.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean(), correct.mean()

    def step(
        state: State, key: Array, images: Array, labels: Array
    ) -> tuple[State, tuple[Array, Array]]:
        augment_key, template_key = jax.random.split(jax.random.fold_in(key, state.step))
        targets = jax.nn.one_hot(labels, len(class_names))
        images, targets = augment(augment_key, images, targets, config.padding, config.cutmix)
        figures, gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, template_key, images, targets
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], HIGHEST_LOGIT_SCALE)
        return State(params, optimizer_state, state.step + 1), figures

    return jax.jit(step, donate_argnums=0)


def train_epoch(
    config: Config,
    train_step: TrainStep,
    state: State,
    key: Array,
    train: Images,
    epoch: int,
    history: History,
) -> State:
    """Train for one epoch in random order and append to the history.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    order = np.random.default_rng((config.seed, epoch)).permutation(len(train.labels))
    batches = order[: len(order) // config.batch * config.batch].reshape(-1, config.batch)
    sums = np.zeros(2)
    with tqdm(batches, desc=f"epoch {epoch + 1}/{config.epochs}", unit="step") as bar:
        for done, rows in enumerate(bar, 1):
            state, figures = train_step(state, key, train.images[rows], train.labels[rows])
            sums += jax.device_get(figures)
            loss, accuracy = sums / done
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is no longer finite in epoch {epoch + 1}; "
                    "try a lower --learning-rate"
                )
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
    history.loss.append(float(loss))
    history.train_accuracy.append(float(accuracy))
    return state


def make_accuracy(config: Config, model: models.CLIP, class_names: tuple[str, ...]) -> Accuracy:
    """Make the function that classifies images with the test prompt."""
    prompts = model.prompts(models.zero_shot_task(model, class_names, [TEST_TEMPLATE]))

    @jax.jit
    def predict(params: dict, images: Array) -> Array:
        return model(params, prompts, images).logits.argmax(-1)

    def accuracy(params: dict, test: Images) -> float:
        images, labels, _ = test
        correct = []
        for start in tqdm(range(0, len(labels), config.batch), desc="test", leave=False):
            # The last batch is filled with the first images, so that one shape is compiled.
            rows = np.arange(start, start + config.batch) % len(labels)
            correct.append(np.asarray(predict(params, images[rows])) == labels[rows])
        return float(np.concatenate(correct)[: len(labels)].mean())

    return accuracy


def summary(history: History) -> str:
    """Format the last epoch's metrics as text."""
    parts = [
        f"loss {history.loss[-1]:.3f}",
        f"accuracy on augmented training images {history.train_accuracy[-1]:.2%}",
    ]
    if history.test_accuracy:
        parts.append(f"test accuracy {history.test_accuracy[-1]:.2%}")
    return ", ".join(parts)


def write(config: Config, model: models.CLIP, params: dict, history: History) -> None:
    """Write checkpoint, metrics and curves atomically."""
    config.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.output) as name:
        folder = Path(name)
        models.save(folder, model, params)
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        record = {"settings": settings, **history._asdict()}
        (folder / "training.json").write_text(json.dumps(record, indent=2))
        plot(folder / "training.png", history)
        for file in folder.iterdir():
            file.replace(config.output / file.name)


def plot(path: Path, history: History) -> None:
    """Draw loss and accuracy over the epochs."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history.loss) + 1)
    left.plot(epochs, history.loss, marker=".")
    left.set(xlabel="epoch", ylabel="training loss")
    right.plot(epochs, history.train_accuracy, marker=".", label="training, augmented")
    if history.test_accuracy:
        right.plot(epochs, history.test_accuracy, marker=".", label="test")
    right.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
    right.legend()
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_script(Config, run, __doc__)
