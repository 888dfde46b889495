"""Train a small CLIP from scratch on a folder of images.

    python experiments/pretrain_tiny_clip.py --train cifar10/train --test cifar10/test

The folder has one subfolder of images per class, named after it. The text tower turns the names
into a classifier, and both towers are trained with its cross-entropy. Images are only cropped,
flipped and mixed, because a model for adaptation to corruptions must not be trained on them. The
result is a transformers checkpoint with the bundled model's architecture and tokenizer.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax.training.train_state import TrainState
from PIL import Image
from tqdm import tqdm
from transformers import CLIPConfig

from jaxtta import assets, cli, data, evaluate, io, models, views

TEMPLATES = (
    *(f"a photo of {which} {{}}." for which in ("a", "the", "one", "my", "a small", "a large")),
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
    test: str  # images of the same classes, classified after every epoch
    output: str = "runs/tiny-clip"  # new folder for checkpoint and training.json
    max_images: int | None = None  # at most so many of each folder, balanced over the classes
    epochs: int = 60  # passes over the training images
    batch: int = 128  # images per step
    learning_rate: float = 5e-4  # peak rate of AdamW, with warm-up and cosine decay to 0
    seed: int = 0  # the same seed gives the same model
    layers: tuple[int, int] = (6, 3)  # blocks of the image tower and of the text tower


def run(config: Config) -> None:
    """Train, and write the results."""
    clip = CLIPConfig.from_pretrained(assets.MODEL)
    clip.vision_config.num_hidden_layers, clip.text_config.num_hidden_layers = config.layers
    model = dataclasses.replace(models.from_config(clip), source=str(assets.MODEL))
    train, test = (read_images(root, model, config) for root in (config.train, config.test))
    if test.class_names != train.class_names:
        raise ValueError(f"{config.test}: has other classes than {config.train}")
    evaluate.require_at_least(epochs=(config.epochs, 1), batch=(config.batch, 1))
    steps = len(train) // config.batch
    train_step = make_train_step(model, train.class_names)
    prompts = model.prompts(models.zero_shot_task(model, train.class_names))
    predict = jax.jit(lambda params, images: model(params, prompts, images).logits.argmax(-1))

    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(init_key) | {"logit_scale": jnp.float32(FIRST_LOGIT_SCALE)}
    total, matrices = config.epochs * steps, jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    warmup = int(WARMUP * (total - 1))
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, total)
    adamw = optax.adamw(rate, b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), adamw)
    state = TrainState.create(apply_fn=model, params=params, tx=optimizer)
    Path(config.output).mkdir(parents=True)  # raises if there is an earlier result
    history = pd.DataFrame(columns=["loss", "train_accuracy", "test_accuracy"], dtype=float)
    for epoch in range(1, config.epochs + 1):
        order = np.random.default_rng((config.seed, epoch - 1)).permutation(len(train))
        sums = np.zeros(2)
        for rows in tqdm(np.split(order[: steps * config.batch], steps), f"epoch {epoch}"):
            state, figures = train_step(state, train_key, train.images[rows], train.labels[rows])
            sums += jax.device_get(figures)
        batches = np.array_split(test.images, math.ceil(len(test) / config.batch))
        found = np.concatenate([predict(state.params, images) for images in batches])
        history.loc[epoch] = [*sums / steps, np.mean(found == test.labels)]
        print(history.tail(1).to_string(header=epoch == 1))
        record = {"settings": dataclasses.asdict(config), **history.to_dict("list")}
        # Raises if a loss is not finite.
        io.write_json(Path(config.output, "training.json"), record)
        models.save(config.output, model, state.params)


def read_images(root: str, model: models.CLIP, config: Config) -> data.ArrayDataset:
    """Images at the model's resolution, balanced over the classes."""
    dataset, rng = data.open_dataset("folder", root), np.random.default_rng(config.seed)
    labels = pd.Series(dataset.labels)
    # One image of every class, then the next of every class, …
    turn = labels.groupby(labels).transform(lambda members: rng.permutation(len(members)))
    order = np.argsort(turn, kind="stable")[: config.max_images].tolist()
    images = [model.preprocessing(Image.fromarray(dataset[n])) for n in tqdm(order, root)]
    return data.ArrayDataset(np.stack(images), dataset.labels[order], dataset.class_names)


def make_train_step(model: models.CLIP, names: tuple[str, ...]) -> Any:
    """Make the jitted `step(state, key, images, labels) -> (state, (loss, accuracy))`."""
    # Padded rather than packed prompts: the templates share one shape and so one program.
    token_ids = jnp.asarray(models.zero_shot_task(model, names, TEMPLATES).token_ids)

    def loss_of(params: dict, key: Any, images: Any, targets: Any) -> tuple[Any, Any]:
        template = jax.random.randint(key, (), 0, len(TEMPLATES))
        classes = models.l2_normalize(model.encode_text(params, token_ids[:, template]))
        logits = model(params, classes, images).logits
        correct = logits.argmax(-1) == targets.argmax(-1)
        targets = optax.smooth_labels(targets, LABEL_SMOOTHING)
        return optax.softmax_cross_entropy(logits, targets).mean(), correct.mean()

    def step(state: TrainState, key: Any, images: Any, labels: Any) -> tuple[TrainState, Any]:
        augment_key, template_key = jax.random.split(jax.random.fold_in(key, state.step))
        one_hot = jax.nn.one_hot(labels, len(names))
        images, targets = views.crop_flip_cutmix(augment_key, images, one_hot, PADDING, CUTMIX)
        differentiated = jax.value_and_grad(loss_of, has_aux=True)
        figures, gradients = differentiated(state.params, template_key, images, targets)
        state = state.apply_gradients(grads=gradients)
        scale = jnp.minimum(state.params["logit_scale"], HIGHEST_LOGIT_SCALE)
        return state.replace(params=state.params | {"logit_scale": scale}), figures

    return jax.jit(step, donate_argnums=0)


if __name__ == "__main__":
    cli.run_script(Config, run, __doc__)
