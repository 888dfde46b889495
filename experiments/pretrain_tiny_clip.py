r"""Train a small CLIP from scratch on a folder of images.

    python experiments/pretrain_tiny_clip.py --train cifar10/train --test cifar10/test \
        --output runs/tiny-clip

The folder contains one subfolder of images per class, named after the class. The text tower turns
the names into a classifier, and both towers are trained with the cross-entropy of its predictions.
Augmentation is limited to crops, flips and CutMix, because a model for test-time adaptation to
corruptions must not be trained on them. The result is an ordinary transformers checkpoint with the
bundled model's architecture and tokenizer, which splits words that it does not know into letters.
"""

import dataclasses
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm
from transformers import CLIPConfig

from jaxtta import assets, cli, data, evaluate, io, models

TEST_TEMPLATE = "a photo of a {}."
TEMPLATES = (
    TEST_TEMPLATE,
    *(f"a photo of {which} {{}}." for which in ("the", "one", "my", "a small", "a large")),
    *("a good photo of a {}.", "a good photo of the {}.", "a bad photo of a {}."),
    *("a close photo of a {}.", "a picture of a {}.", "an image of a {}.", "an image of the {}."),
    *("this is a {}.", "a {}.", "{}"),
)
WARMUP, WEIGHT_DECAY, CLIP_NORM, LABEL_SMOOTHING = 0.05, 0.05, 1.0, 0.1
PADDING, CUTMIX = 4, 0.5  # black pixels around an image before the crop, share of mixed images
FIRST_LOGIT_SCALE, HIGHEST_LOGIT_SCALE = math.log(1 / 0.07), math.log(100)  # CLIP's own


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small CLIP from scratch on a folder of images, and write a checkpoint."""

    train: str  # training images: FOLDER/<class>/<any name>.jpg or .png, or an .npz file
    test: str | None = None  # images of the same classes, classified after every epoch
    output: Path = Path("runs/tiny-clip")  # folder for checkpoint, training.json and .png
    overwrite: bool = False  # replace an existing checkpoint in the output folder
    max_images: int | None = None  # at most so many of each folder, balanced over the classes
    epochs: int = 60  # passes over the training images
    batch: int = 128  # images per step
    learning_rate: float = 5e-4  # peak rate of AdamW, with warm-up and cosine decay to 0
    seed: int = 0  # the same seed gives the same model
    layers: tuple[int, int] = (6, 3)  # blocks of the image tower and of the text tower
    debug: bool = False  # show the traceback of an error


def run(config: Config) -> None:
    """Train, and write the results after every epoch."""
    counts = {name: (getattr(config, name), 1) for name in ("epochs", "batch", "max_images")}
    counts |= {"layers": (min(config.layers), 1), "seed": (config.seed, 0)}
    evaluate.require_at_least(**counts)
    written = [config.output / name for name in ("config.json", "model.safetensors")]
    if not config.overwrite and any(path.exists() for path in written):
        raise FileExistsError(f"{config.output}: already has a checkpoint; --overwrite replaces it")
    clip = CLIPConfig.from_pretrained(assets.MODEL)
    clip.vision_config.num_hidden_layers, clip.text_config.num_hidden_layers = config.layers
    model = dataclasses.replace(models.from_config(clip), source=str(assets.MODEL))
    train = read_images(config.train, model, config)
    test = read_images(config.test, model, config) if config.test else None
    if test and test.class_names != train.class_names:
        raise ValueError(f"{config.test}: has other classes than {config.train}")
    steps = len(train) // config.batch
    if not steps:
        raise ValueError(f"--batch is {config.batch}, above the {len(train)} training images")
    optimizer = make_optimizer(config.learning_rate, config.epochs * steps)
    train_step = make_train_step(model, optimizer, train.class_names)
    prompts = model.prompts(models.zero_shot_task(model, train.class_names, [TEST_TEMPLATE]))
    predict = jax.jit(lambda params, images: model(params, prompts, images).logits.argmax(-1))

    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(init_key)
    params["logit_scale"] = jnp.float32(FIRST_LOGIT_SCALE)
    state = params, optimizer.init(params), jnp.zeros((), jnp.int32)
    history = pd.DataFrame()
    for epoch in range(1, config.epochs + 1):
        order = np.random.default_rng((config.seed, epoch - 1)).permutation(len(train))
        sums = np.zeros(2)
        for rows in tqdm(np.split(order[: steps * config.batch], steps), f"epoch {epoch}"):
            state, figures = train_step(state, train_key, train.images[rows], train.labels[rows])
            sums += jax.device_get(figures)
            if not math.isfinite(sums[0]):
                where = f"the loss is no longer finite in epoch {epoch}"
                raise FloatingPointError(f"{where}; try a lower --learning-rate")
        history.loc[epoch, ["loss", "train_accuracy"]] = sums / steps
        if test:
            # The last batch is filled with the first images, so that one shape is compiled.
            rows = np.arange(math.ceil(len(test) / config.batch) * config.batch) % len(test)
            batches = test.images[rows.reshape(-1, config.batch)]
            found = np.concatenate([predict(state[0], images) for images in batches])
            history.loc[epoch, "test_accuracy"] = np.mean(found[: len(test)] == test.labels)
        write(config, model, state[0], history)
        values = ", ".join(f"{name} {value:.4f}" for name, value in history.loc[epoch].items())
        print(f"epoch {epoch}/{config.epochs}: {values}")
    print(f"{config.output} holds the checkpoint")


def read_images(root: str, model: models.CLIP, config: Config) -> data.ArrayDataset:
    """Images at the model's resolution, balanced over the classes; unreadable ones are skipped."""
    dataset = data.open_dataset("folder", root)
    limit, classes = config.max_images or len(dataset), np.unique(dataset.labels)
    if limit < len(classes):
        raise ValueError(f"--max-images is {limit}, less than the {len(classes)} classes")
    rng, turn = np.random.default_rng(config.seed), np.empty(len(dataset), int)
    for label in classes:  # one image of every class, then the next of every class, …
        members = np.flatnonzero(dataset.labels == label)
        turn[members] = rng.permutation(len(members))
    images, labels = [], []
    for number in tqdm(np.argsort(turn, kind="stable")[:limit], f"reading {root}"):
        try:
            images.append(model.preprocessing(Image.fromarray(dataset[int(number)])))
            labels.append(dataset.labels[number])
        except data.UnreadableImageError as error:
            tqdm.write(f"skipped {error}", file=sys.stderr)
    for label, name in enumerate(dataset.class_names):
        if label not in labels:
            raise ValueError(f"{root}: none of the selected images of {name} is readable")
    return data.ArrayDataset(np.stack(images), np.asarray(labels), tuple(dataset.class_names))


def augment(key: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    """Crop and flip uint8 images, and paste parts of others into some of them (CutMix).

    References:
        Yun et al. 2019, https://arxiv.org/abs/1905.04899
    """
    crop_key, flip_key, mix_key = jax.random.split(key, 3)
    batch, side = images.shape[:2]
    padded = jnp.pad(images, [(0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)])
    corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * PADDING + 1)
    images = jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
    )(padded, corners)
    flipped = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)

    which_key, area_key, centre_key = jax.random.split(mix_key, 3)
    mixed = jax.random.bernoulli(which_key, CUTMIX, (batch, 1))
    # The area is uniform, as of Beta(1, 1), until the image's border cuts the rectangle.
    extent = mixed * side * jnp.sqrt(jax.random.uniform(area_key, (batch, 1)))
    centre = jax.random.uniform(centre_key, (2, batch, 1), maxval=side)
    rows, columns = jnp.abs(jnp.arange(side) + 0.5 - centre) < extent / 2
    pasted = rows[:, :, None] & columns[:, None, :]
    part = pasted.mean((1, 2))[:, None]
    # Batches are in random order, so the next image is a random one.
    images = jnp.where(pasted[..., None], jnp.roll(images, 1, 0), images)
    return images, (1 - part) * targets + part * jnp.roll(targets, 1, 0)


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay, gradient clipping and CLIP's second beta."""
    warmup = int(WARMUP * (steps - 1))
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)

    def matrices(params: dict) -> dict:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    adamw = optax.adamw(rate, b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(CLIP_NORM), adamw)


def make_train_step(model: models.CLIP, optimizer: Any, names: tuple[str, ...]) -> Any:
    """Make the jitted `step(state, key, images, labels) -> (state, (loss, accuracy))`.

    A state is the parameters, the optimiser's state and the number of steps.
    """
    task = models.zero_shot_task(model, names, TEMPLATES)
    model.prompts(task)  # raises if a prompt is too long for the model
    # Padded rather than packed prompts: the templates share one shape and so one program.
    token_ids = jnp.asarray(task.token_ids)

    def loss_of(params: dict, key: Any, images: Any, targets: Any) -> tuple[Any, Any]:
        template = jax.random.randint(key, (), 0, len(TEMPLATES))
        classes = models.l2_normalize(model.encode_text(params, token_ids[:, template]))
        logits = model(params, classes, images).logits
        correct = logits.argmax(-1) == targets.argmax(-1)
        targets = optax.smooth_labels(targets, LABEL_SMOOTHING)
        return optax.softmax_cross_entropy(logits, targets).mean(), correct.mean()

    def step(state: tuple, key: Any, images: Any, labels: Any) -> tuple[tuple, Any]:
        params, optimizer_state, count = state
        augment_key, template_key = jax.random.split(jax.random.fold_in(key, count))
        images, targets = augment(augment_key, images, jax.nn.one_hot(labels, len(names)))
        differentiated = jax.value_and_grad(loss_of, has_aux=True)
        figures, gradients = differentiated(params, template_key, images, targets)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], HIGHEST_LOGIT_SCALE)
        return (params, optimizer_state, count + 1), figures

    return jax.jit(step, donate_argnums=0)


def write(config: Config, model: models.CLIP, params: dict, history: pd.DataFrame) -> None:
    """Write checkpoint, metrics and curves, each file whole or not at all."""
    config.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.output) as name:
        folder = Path(name)
        models.save(folder, model, params)
        settings = dataclasses.asdict(config) | {"output": str(config.output)}
        record = {"settings": settings, **history.to_dict("list")}
        io.write_json(folder / "training.json", record)
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        history.plot(y="loss", ax=left, marker=".", xlabel="epoch", ylabel="training loss")
        history.drop(columns="loss").plot(ax=right, marker=".", xlabel="epoch", ylabel="accuracy")
        figure.savefig(folder / "training.png", dpi=150)
        for file in folder.iterdir():
            file.replace(config.output / file.name)


if __name__ == "__main__":
    cli.run_script(Config, run, __doc__)
