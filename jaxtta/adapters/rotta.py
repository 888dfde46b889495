"""RoTTA: a student learns from its moving average on a memory of images of all classes alike.

The teacher θ̄ predicts. Images enter a memory (see `rotta_memory`); after every 64 images the
student takes a step on strong views v' of those x in the memory, with ages a,

    L = mean_j w(a_j) CE(p(x_j; θ̄), p(v'_j; θ)),   w(a) = e^{−a/64}/(1 + e^{−a/64}),

and the teacher follows, θ̄ ← 0.999 θ̄ + 0.001 θ. It is made for streams whose classes come in runs.
Three forward passes and a backward one an image; the memory holds 64 images in float.

References:
    Yuan et al., CVPR 2023, https://arxiv.org/abs/2303.13899
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtta import tree
from jaxtta.adapters.base import (
    Adapter,
    Array,
    Prediction,
    Preset,
    State,
    image_check,
    require_state,
)
from jaxtta.adapters.filters import logits_of_one, require_range, towards
from jaxtta.adapters.online_checks import require_same_adapter
from jaxtta.adapters.rotta_memory import (
    RoTTAMemory,
    empty_bank,
    fill_bank,
    newcomers_of,
)
from jaxtta.adapters.settings import at_least
from jaxtta.losses import masked_mean
from jaxtta.models import Batch, Classifier, Task, as_batch, context_of, with_batch_norm_statistics
from jaxtta.optim import require_optimizer
from jaxtta.strong_views import in_unit_range, strong_view
from jaxtta.tree import Trainable, normalisation_parameters

ROTTA_PRESETS = {
    name: Preset(partial(optax.adam, 1e-3), 64)
    for name in ("cifar10-c", "cifar100-c", "imagenet-c")
}


def rotta(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trainable: Trainable | None = None,
    places: int = 64,
    every: int = 64,
    teacher_share: float = 0.001,
    timeliness: float = 1.0,
    certainty: float = 1.0,
    augment: Callable[[Array, Array, Array], Array] | None = None,
) -> Adapter:
    """Predict with a teacher that follows a student, which learns from a memory of images.

    Batch norms use the checkpoint's statistics; the paper's moving ones are not there.

    Args:
        model: any classifier.
        task: the classes; None for a model that has its own.
        optimizer: an optax transformation; None for `ROTTA_PRESETS["imagenet-c"]`.
        trainable: which parameters to adapt, a predicate on paths; None for
            `normalisation_parameters("image")`.
        places: N, of the memory.
        every: images from one step to the next.
        teacher_share: how far the teacher follows after each.
        timeliness: λ_t, how much an image's age counts against it.
        certainty: λ_u, how much its uncertainty does.
        augment: `augment(key, index, image)`, another strong view; None for `strong_view` with
            blur and noise.

    Returns:
        The adapter; `init` takes a key, from which views are drawn. Metrics have the mean `loss` of
        the batch's steps (0 for none), `updates`, how many there were, and `remembered`, how many
        images are in the memory. A batch with a prediction or update that is not finite leaves the
        state as it was.

    Raises:
        TypeError: as `tent`.
        ValueError: if a setting is out of range, the model needs a task and there is none; in
            `init`, if no parameter is chosen.

    Examples:
        >>> adapter = jaxtta.adapters.rotta(model, task, places=16)  # names: see `jaxtta.load`
        >>> state = adapter.init(params, jax.random.key(0))  # the key draws views
    """
    at_least(1, places=places, every=every)
    require_range(0, 1, teacher_share=teacher_share)
    require_range(0, np.inf, timeliness=timeliness, certainty=certainty)
    model = with_batch_norm_statistics(model, "running")
    trainable = normalisation_parameters("image") if trainable is None else trainable
    optimizer = ROTTA_PRESETS["imagenet-c"].optimizer() if optimizer is None else optimizer
    require_optimizer(optimizer)
    context, check_values = context_of(model, task, trainable), image_check()

    fill = partial(fill_bank, timeliness=timeliness, certainty=certainty)

    def strong(key: Array, index: Array, image: Array) -> Array:
        return strong_view(jax.random.fold_in(key, index), image, noisy=True)

    def first_memory(params: Any, own: Any, key: Array, student: Any) -> RoTTAMemory:
        logits = logits_of_one(model, params, own)
        bank = empty_bank(places, logits.dtype)
        images = jnp.zeros((places, model.image_size, model.image_size, 3))
        return RoTTAMemory(jax.tree.map(jnp.copy, student), bank, images, jax.random.key_data(key))

    def init(params: Any, key: Array | None = None) -> State:
        tree.require_params(params)
        student = tree.adapted_part(params, trainable)
        own = jax.tree.map(jnp.copy, context(params))
        memory = first_memory(params, own, jax.random.key(0) if key is None else key, student)
        seen = jnp.zeros((), jnp.int32)
        mark = tree.fingerprint(params)
        return State(student, optimizer.init(student), own, seen, mark, memory)

    def learn(params: Any, state: State) -> tuple[State, Array]:
        (teacher, bank, images, key), count = state.memory, state.seen
        remembered = Batch(images, bank.label >= 0, bank.index)
        key = jax.random.fold_in(jax.random.wrap_key_data(key), count)
        views = jax.vmap(partial(augment or strong, key))(bank.index, images)
        seen = remembered._replace(images=views)
        logits = model(tree.merge(params, teacher), state.context, as_batch(remembered)).logits
        weights = jax.nn.sigmoid((-bank.age / places).astype(logits.dtype))

        def loss_of(student: Any) -> Array:
            own = model(tree.merge(params, student), state.context, as_batch(seen)).logits
            losses = optax.softmax_cross_entropy(own, jax.nn.softmax(logits))
            return masked_mean(weights * losses, remembered.mask)

        loss, gradients = jax.value_and_grad(loss_of)(state.adapted)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.adapted)
        student = optax.apply_updates(state.adapted, updates)
        memory = state.memory._replace(teacher=towards(teacher, student, teacher_share))
        return state._replace(adapted=student, optimizer=optimizer_state, memory=memory), loss

    def step(params: Any, state: State, batch: Batch | Array) -> tuple[State, Prediction]:
        require_state(State, params, state)
        fresh = partial(first_memory, key=jax.random.key(0), student=state.adapted)
        require_same_adapter(params, state, trainable, optimizer.init, fresh)
        batch = as_batch(batch, state.seen)
        check_values(batch.images)
        outputs = model(tree.merge(params, state.memory.teacher), state.context, batch)
        logits, mask = outputs.logits, jnp.asarray(batch.mask)
        classes = logits.shape[1]
        number = state.seen + jnp.cumsum(mask, dtype=jnp.int32)
        newcomers = newcomers_of(logits, batch, number)
        pixels = in_unit_range(batch.images).astype(state.memory.images.dtype)
        # Images up to a step, then the step, and so on; the last part is without one.
        parts = (number - 1) // every - state.seen // every

        def go_on(state: State, part: Array) -> tuple[State, tuple[Array, Array]]:
            now, memory = mask & (parts == part), state.memory
            bank, images = fill(memory.bank, memory.images, newcomers, pixels, now, classes)
            memory = memory._replace(bank=bank, images=images)
            state = state._replace(memory=memory, seen=state.seen + now.sum(dtype=jnp.int32))
            due = now.any() & (state.seen % every == 0)
            idle = (state, jnp.zeros((), logits.dtype))
            state, loss = jax.lax.cond(due, lambda: learn(params, state), lambda: idle)
            return state, (loss, due)

        steps = jnp.arange(-(-len(mask) // every) + 1)
        after, (losses, due) = jax.lax.scan(go_on, state, steps)
        finite = (
            jnp.isfinite(jnp.where(mask[:, None], logits, 0)).all()
            & jnp.isfinite(losses).all()
            & tree.all_finite(after.adapted)
            & tree.stays_finite(state.optimizer, after.optimizer)
        )
        metrics = {
            "loss": losses.sum() / jnp.maximum(due.sum(), 1),
            "updates": due.sum(),
            "remembered": (after.memory.bank.label >= 0).sum(),
            "skipped": mask.any() & ~finite,
        }
        changed = {
            name: optax.tree.where(finite & mask.any(), getattr(after, name), getattr(state, name))
            for name in ("adapted", "optimizer", "memory", "seen")
        }
        outputs = outputs._replace(layer_features=None)
        return state._replace(**changed), Prediction(logits, metrics, outputs)

    return Adapter(init, step)
