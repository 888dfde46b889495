"""Epochs of meta-training over images in memory, a judgement after each, and the best of them.

    train_epoch = make_train_epoch(loss_of, optax.adam(1e-2), learning_rate=1e-4)
    for state, history in pretrain(train_epoch, judge, state, images, orders):
        save(state, history)
    best = best_epoch(history, "accuracy")

`loss_of(frozen, adapted, images)` is a loss without labels; `frozen` are arrays that stay the same.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

from jaxtta.optim.meta_gradient import MGGParams
from jaxtta.optim.meta_training import MetaState, begin_epoch, meta_step


class EpochMetrics(NamedTuple):
    """Metrics of an epoch; those of validation images are None without any.

    Attributes:
        loss: mean over the training batches.
        val_loss: mean over the validation images.
        accuracy: top-1 on the validation images.
    """

    loss: float | None
    val_loss: float | None
    accuracy: float | None


Judge = Callable[[MGGParams, str], tuple[float | None, float | None]]
TrainEpoch = Callable[[MetaState, np.ndarray], tuple[MetaState, np.ndarray]]


def make_train_epoch(
    loss_of: Callable[[Any, Any, jax.Array], jax.Array],
    frozen: Any,
    optimizer: optax.GradientTransformation,
    learning_rate: float,
    batch_size: int = 2,
    truncation: int = 1,
) -> TrainEpoch:
    """`train(state, images) -> (state, losses)` for one epoch, with two compiled functions.

    Args:
        loss_of: `loss_of(frozen, adapted, images)`.
        frozen: arrays that stay the same.
        optimizer: trains the generator's weights.
        learning_rate: of the generator's updates.
        batch_size: images per update; images that do not fill a batch are left out.
        truncation: updates that a step differentiates through.
    """

    # Arguments, so that the frozen arrays are not compiled in as constants.
    @jax.jit
    def begin(frozen: Any, state: MetaState, batch: Any) -> tuple[MetaState, jax.Array]:
        return begin_epoch(functools.partial(loss_of, frozen), learning_rate)(state, batch)

    @jax.jit
    def step(frozen: Any, state: MetaState, batches: Any) -> tuple[MetaState, jax.Array]:
        loss = functools.partial(loss_of, frozen)
        return meta_step(loss, optimizer, learning_rate)(state, batches)

    def train(state: MetaState, images: np.ndarray) -> tuple[MetaState, np.ndarray]:
        whole = len(images) // batch_size * batch_size
        batches = images[:whole].reshape(-1, batch_size, *images.shape[1:])
        state, loss = begin(frozen, state, batches[0])
        losses = [loss[None]]
        for first in range(1, len(batches), truncation):
            state, window = step(frozen, state, batches[first : first + truncation])
            losses.append(window)
        return state, np.concatenate(losses)

    return train


def pretrain(
    train_epoch: TrainEpoch,
    judge: Judge,
    state: MetaState,
    images: np.ndarray,
    orders: Sequence[np.ndarray],
    history: Sequence[EpochMetrics] = (),
) -> Iterator[tuple[MetaState, list[EpochMetrics]]]:
    """Train for the epochs that `history` lacks; yields the state and the metrics after each.

    Args:
        train_epoch: from `make_train_epoch`.
        judge: from `make_judge`.
        state: after the epochs in `history`.
        images: (images, height, width, 3).
        orders: permutations of the images, one per epoch.
        history: metrics of the finished epochs.

    Raises:
        FloatingPointError: if a loss is no longer finite.
    """
    history = [*history]
    for number, order in enumerate(orders[len(history) :], len(history) + 1):
        state, losses = train_epoch(state, images[order])
        if not np.isfinite(losses).all():
            raise FloatingPointError(
                f"the loss is no longer finite in epoch {number}; try a lower --inner-learning-rate"
            )
        metrics = EpochMetrics(float(losses.mean()), *judge(state.phi, f"epoch {number}"))
        history.append(metrics)
        yield state, history


def make_judge(
    adapter_of: Callable[[Any, MGGParams], Any],
    frozen: Any,
    correct: Callable[[jax.Array, Any], jax.Array],
    streams: Sequence[Sequence[tuple[Any, Any]]],
) -> Judge:
    """`judge(phi, name) -> (loss, accuracy)`, measured by adapting to validation images.

    Both are None without streams; a FloatingPointError if a loss or an update is not finite.

    Args:
        adapter_of: `adapter_of(frozen, phi)`, an adapter that updates with these weights.
        frozen: arrays that stay the same; the first are the model's parameters.
        correct: which predictions are right: `correct(logits, labels)`, (batch,) bool.
        streams: batches and labels of each validation stream; the adapter starts anew on each.
    """

    @jax.jit
    def init(frozen: Any, phi: MGGParams) -> Any:
        return adapter_of(frozen, phi).init(frozen[0])

    @jax.jit
    def step(frozen: Any, phi: MGGParams, state: Any, batch: Any, labels: Any) -> Any:
        state, prediction = adapter_of(frozen, phi).step(frozen[0], state, batch)
        figures = prediction.metrics["loss"], prediction.metrics["skipped"]
        return state, (*figures, correct(prediction.logits, labels))

    def judge(phi: MGGParams, name: str) -> tuple[float | None, float | None]:
        losses, answers = [], []
        for batches in tqdm(streams, name, unit="corruption", leave=False):
            state = init(frozen, phi)
            for batch, labels in batches:
                state, (loss, skipped, right) = step(frozen, phi, state, batch, labels)
                if skipped:
                    raise FloatingPointError(
                        f"{name}: a loss or an update on validation images is not finite"
                    )
                losses.append(float(loss))
                answers.append(np.asarray(right)[batch.mask])
        if not streams:
            return None, None
        loss = np.average(losses, weights=[len(right) for right in answers])
        return float(loss), float(np.concatenate(answers).mean())

    return judge


def best_epoch(
    history: Sequence[EpochMetrics], select_by: Literal["accuracy", "loss"] = "accuracy"
) -> int:
    """Index of the epoch with the highest accuracy or the lowest loss; the first of equal ones.

    Examples:
        >>> Epoch = jaxtta.optim.EpochMetrics
        >>> jaxtta.optim.best_epoch([Epoch(1.0, 0.9, accuracy=0.5), Epoch(0.8, 0.7, accuracy=0.6)])
        1
    """
    if select_by == "accuracy":
        return max(range(len(history)), key=lambda number: history[number].accuracy or 0)
    losses: list[Any] = [e.loss if e.val_loss is None else e.val_loss for e in history]
    return int(np.argmin(losses))
