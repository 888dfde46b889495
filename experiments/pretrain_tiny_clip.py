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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPConfig

from jaxtta import assets, cli, data, evaluate, io, models

Array = jax.Array
TEST_TEMPLATE = "a photo of a {}."
TEMPLATES = (
    TEST_TEMPLATE,
    *(f"a photo of {which} {{}}." for which in ("the", "one", "my", "a small", "a large")),
    *("a good photo of a {}.", "a good photo of the {}.", "a bad photo of a {}."),
    *("a close photo of a {}.", "a picture of a {}.", "an image of a {}.", "an image of the {}."),
    *("this is a {}.", "a {}.", "{}"),
)
FIRST_LOGIT_SCALE, HIGHEST_LOGIT_SCALE = math.log(1 / 0.07), math.log(100)  # CLIP's own


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small CLIP from scratch on a folder of images, and write a checkpoint."""

    train: str  # training images: FOLDER/<class>/<any name>.jpg or .png, or an .npz file
    test: str | None = None  # images of the same classes, classified after every epoch
    output: Path = Path("runs/tiny-clip")  # folder for checkpoint, training.json and .png
    overwrite: bool = False  # replace an existing checkpoint in the output folder
    tokenizer: Path = assets.MODEL  # folder with one of CLIP's; the default knows few words
    max_images: int | None = None  # at most so many of each folder, balanced over the classes
    epochs: int = 60  # passes over the training images
    batch: int = 128  # images per step
    learning_rate: float = 5e-4  # peak rate of AdamW, with cosine decay to 0
    warmup: float = 0.05  # fraction of steps for linear warm-up of the learning rate
    weight_decay: float = 0.05  # of AdamW, on matrices only
    clip_norm: float = 1.0  # maximum gradient norm
    label_smoothing: float = 0.1  # amount of label smoothing
    padding: int = 4  # black pixels of padding on each side before the random crop
    cutmix: float = 0.5  # fraction of the images augmented with CutMix
    seed: int = 0  # the same seed gives the same model
    vision: tuple[int, int, int] = (6, 192, 3)  # the image tower's layers, width and heads
    text: tuple[int, int, int] = (3, 128, 4)  # the text tower's
    embedding: int = 128  # size of the joint embedding space
    image_size: int = 32  # side of the model's input in pixels; images are resized to it
    patch_size: int = 4  # side of a patch in pixels
    text_length: int = 32  # maximum number of tokens in a prompt
    debug: bool = False  # show the traceback of an error


def run(config: Config) -> None:
    """Train, and write the results after every epoch."""
    check(config)
    model = make_model(config)
    train = read_images(config.train, model, config)
    test = read_images(config.test, model, config) if config.test else None
    if test and test.class_names != train.class_names:
        raise ValueError(f"{config.test}: has other classes than {config.train}")
    if len(train) < config.batch:
        raise ValueError(f"--batch is {config.batch}, above the {len(train)} training images")
    steps = len(train) // config.batch
    optimizer = make_optimizer(config, config.epochs * steps)
    train_step = make_train_step(config, model, optimizer, train.class_names)
    prompts = model.prompts(models.zero_shot_task(model, train.class_names, [TEST_TEMPLATE]))
    predict = jax.jit(lambda params, images: model(params, prompts, images).logits.argmax(-1))

    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(init_key)
    params["logit_scale"] = jnp.float32(FIRST_LOGIT_SCALE)
    state = params, optimizer.init(params), jnp.zeros((), jnp.int32)
    history: dict[str, list[float]] = {"loss": [], "train_accuracy": [], "test_accuracy": []}
    for epoch in range(config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(len(train))
        sums = np.zeros(2)
        for rows in tqdm(np.split(order[: steps * config.batch], steps), f"epoch {epoch + 1}"):
            images, labels = train.images[rows], train.labels[rows]
            state, figures = train_step(state, train_key, images, labels)
            sums += jax.device_get(figures)
            if not math.isfinite(sums[0]):
                where = f"the loss is no longer finite in epoch {epoch + 1}"
                raise FloatingPointError(f"{where}; try a lower --learning-rate")
        history["loss"].append(sums[0] / steps)
        history["train_accuracy"].append(sums[1] / steps)
        if test:
            # The last batch is filled with the first images, so that one shape is compiled.
            rows = np.arange(math.ceil(len(test) / config.batch) * config.batch) % len(test)
            batches = test.images[rows.reshape(-1, config.batch)]
            found = np.concatenate([predict(state[0], images) for images in batches])
            history["test_accuracy"].append(float(np.mean(found[: len(test)] == test.labels)))
        write(config, model, state[0], history)
        last = [f"{name} {values[-1]:.4f}" for name, values in history.items() if values]
        print(f"epoch {epoch + 1}/{config.epochs}: {', '.join(last)}")
    print(f"{config.output} holds the checkpoint")


def check(config: Config) -> None:
    """Raise a ValueError for invalid options, a FileExistsError for an earlier checkpoint."""
    counts = ("epochs", "batch", "max_images", "embedding", "image_size", "patch_size")
    least = {name: (getattr(config, name), 1) for name in (*counts, "text_length")}
    least |= {"vision": (min(config.vision), 1), "text": (min(config.text), 1)}
    for name in ("seed", "padding", "weight_decay"):
        least[name] = getattr(config, name), 0
    evaluate.require_at_least(**least)
    evaluate.require_positive(learning_rate=[config.learning_rate], clip_norm=[config.clip_norm])
    for name in ("warmup", "cutmix", "label_smoothing"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(config, name)}, expected 0 to 1"
            )
    for name, (_, width, heads) in (("vision", config.vision), ("text", config.text)):
        if width % heads:
            raise ValueError(f"--{name} has {heads} heads, expected a divisor of its width {width}")
    written = [config.output / name for name in ("config.json", "model.safetensors")]
    if not config.overwrite and any(path.exists() for path in written):
        raise FileExistsError(f"{config.output}: already has a checkpoint; --overwrite replaces it")


def make_model(config: Config) -> models.CLIP:
    """Make the model for the tokenizer's vocabulary."""
    if not config.tokenizer.is_dir():
        raise FileNotFoundError(f"{config.tokenizer}: no such tokenizer folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    except Exception as error:  # transformers and tokenizers may raise any exception
        raise ValueError(f"{config.tokenizer}: its tokenizer cannot be read ({error})") from error
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = {name: getattr(tokenizer, name) for name in tokens}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": config.text_length}
    vision = {"image_size": config.image_size, "patch_size": config.patch_size}
    for tower, (layers, width, heads) in ((vision, config.vision), (text, config.text)):
        tower |= {"num_hidden_layers": layers, "num_attention_heads": heads}
        tower |= {"hidden_size": width, "intermediate_size": 4 * width, "hidden_act": "quick_gelu"}
    clip = CLIPConfig(projection_dim=config.embedding, vision_config=vision, text_config=text)
    return dataclasses.replace(models.from_config(clip), source=str(config.tokenizer))


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


def augment(
    key: Array, images: Array, targets: Array, padding: int, share: float
) -> tuple[Array, Array]:
    """Crop and flip uint8 images, and paste parts of others into a share of them (CutMix).

    References:
        Yun et al. 2019, https://arxiv.org/abs/1905.04899
    """
    crop_key, flip_key, mix_key = jax.random.split(key, 3)
    batch, side = images.shape[:2]
    padded = jnp.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * padding + 1)
    images = jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
    )(padded, corners)
    flipped = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)

    which_key, area_key, centre_key = jax.random.split(mix_key, 3)
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
    warmup = int(config.warmup * (steps - 1))
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, steps)

    def matrices(params: dict) -> dict:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    adamw = optax.adamw(rate, b2=0.98, weight_decay=config.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def make_train_step(
    config: Config, model: models.CLIP, optimizer: Any, names: tuple[str, ...]
) -> Any:
    """Make the jitted `step(state, key, images, labels) -> (state, (loss, accuracy))`.

    A state is the parameters, the optimiser's state and the number of steps.
    """
    task = models.zero_shot_task(model, names, TEMPLATES)
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

    def step(state: tuple, key: Array, images: Array, labels: Array) -> tuple[tuple, Any]:
        params, optimizer_state, count = state
        augment_key, template_key = jax.random.split(jax.random.fold_in(key, count))
        targets = jax.nn.one_hot(labels, len(names))
        images, targets = augment(augment_key, images, targets, config.padding, config.cutmix)
        differentiated = jax.value_and_grad(loss_of, has_aux=True)
        figures, gradients = differentiated(params, template_key, images, targets)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], HIGHEST_LOGIT_SCALE)
        return (params, optimizer_state, count + 1), figures

    return jax.jit(step, donate_argnums=0)


def write(config: Config, model: models.CLIP, params: dict, history: dict[str, list]) -> None:
    """Write checkpoint, metrics and curves, each file whole or not at all."""
    config.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.output) as name:
        folder = Path(name)
        models.save(folder, model, params)
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        io.write_json(folder / "training.json", {"settings": settings, **history})
        curves = pd.DataFrame({name: values for name, values in history.items() if values})
        axes = curves.plot(
            subplots=[("loss",), tuple(curves.columns[1:])], marker=".", xlabel="epoch"
        )
        axes[0].figure.savefig(folder / "training.png", dpi=150)
        for file in folder.iterdir():
            file.replace(config.output / file.name)


if __name__ == "__main__":
    cli.run_script(Config, run, __doc__)
