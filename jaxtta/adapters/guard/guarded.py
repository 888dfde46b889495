"""A guard around any adapter: the frozen model answers too, and what harms is taken back.

    reference = jaxtta.adapters.zero_shot(model, task)
    adapter = jaxtta.guarded(jaxtta.adapters.batclip(model, task), reference)
    state = adapter.init(params)
    step = jax.jit(adapter.step, donate_argnums=1)
    for images in batches:
        state, prediction = step(params, state, images)     # prediction.metrics["decision"]

`policy.py` says what is decided, by which signals; here it is carried out. For streams side by side
the context is broadcast, as with any adapter:

    axes = jaxtta.adapters.stream_axes(state)
    init = jax.vmap(lambda key: adapter.init(params, key), out_axes=axes)
    step = jax.vmap(adapter.step, in_axes=(None, axes, 0), out_axes=(axes, 0))
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtta.adapters.base import Adapter, Answers, Array, Metrics, Prediction, require_state
from jaxtta.adapters.guard import image_statistics as environments
from jaxtta.adapters.guard import signals as of
from jaxtta.adapters.guard.canary import Canary, check_canary, no_checks
from jaxtta.adapters.guard.labels import Pairs, is_worse, no_pairs
from jaxtta.adapters.guard.mixture import mix
from jaxtta.adapters.guard.policy import DECISIONS, Policy, decide
from jaxtta.adapters.guard.state import (
    GuardContext,
    GuardState,
    changing,
    pushed,
    put_back,
    repeated,
)
from jaxtta.adapters.on_features import gathered
from jaxtta.models import Batch, as_batch

CAREFUL = Policy()


def guarded(
    adapter: Adapter, reference: Adapter, policy: Policy = CAREFUL, *, canary: Canary | None = None
) -> Adapter:
    """Guard an adapter: serve a mixture with the frozen model, and take back what harms.

    A fully masked batch leaves the state as it was, bit for bit. The adapter inside does not learn
    from images that are not finite; their answers are the frozen model's.

    Args:
        adapter: any adapter; one that has nothing to roll back has answers to mix.
        reference: the frozen model, `zero_shot(model, task)`.
        policy: when to mix, skip, forget, roll back and stop.
        canary: labelled images that both models are tried on now and then, beside the stream; if
            the adapted one is less accurate, it stops for good.

    Returns:
        The adapter. Its predictions have `answers`, both models' logits, and metrics beside those
        of the adapter inside: share, decision, reason, strikes, updates and the signals.

    Raises:
        TypeError: if an argument is of another kind.

    Examples:
        >>> reference = jaxtta.adapters.zero_shot(model, task)  # names: see `jaxtta.load`
        >>> adapter = jaxtta.guarded(jaxtta.adapters.tent(model, task), reference)
    """
    for name, given in (("adapter", adapter), ("reference", reference)):
        if not (hasattr(given, "init") and hasattr(given, "step")):
            raise TypeError(f"{name} is a {type(given).__name__}, expected an adapter")
    if not isinstance(policy, Policy):
        raise TypeError(f"policy is a {type(policy).__name__}, expected a Policy")
    side = getattr(reference.init, "image_size", None)
    if side is None:
        raise TypeError("reference is another adapter, expected zero_shot(model, task)")

    def init(params: Any, key: Array | None = None) -> GuardState:
        inner, frozen = adapter.init(params, key), reference.init(params)
        images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
        logits = jax.eval_shape(reference.step, params, frozen, images)[1].logits
        dtype = jnp.promote_types(logits.dtype, jnp.float32)
        # Copies: no array may be in a donated state twice.
        source = jax.tree.map(jnp.copy, changing(inner))
        known = () if canary is None else canary.right(reference, params, frozen)
        zero = jnp.zeros((), jnp.int32)
        return GuardState(
            inner,
            GuardContext(frozen, source, known),
            repeated(source, policy.snapshots),
            jax.tree.map(jnp.copy, of.no_averages(logits.shape[-1], dtype)),
            jax.tree.map(jnp.copy, environments.empty(dtype)),
            () if canary is None else jax.tree.map(jnp.copy, no_checks()),
            jax.tree.map(jnp.copy, no_pairs()),
            *(jnp.copy(zero), jnp.zeros((), bool), jnp.copy(zero), zero),
            jnp.copy(frozen.fingerprint),
        )

    def step(params: Any, state: GuardState, batch: Batch | Array) -> tuple[Any, Prediction]:
        require_state(GuardState, params, state)
        batch = as_batch(batch, state.seen)
        finite = jnp.isfinite(batch.images).all((1, 2, 3))
        _, frozen = reference.step(params, state.context.reference, batch)
        inner, own = adapter.step(params, state.inner, batch._replace(mask=batch.mask & finite))
        dtype = state.averages.reference.dtype
        each = environments.image_statistics(batch.images, batch.sizes)
        logits = frozen.logits.astype(dtype), own.logits.astype(dtype)
        first, second, each, mask, finite = gathered((*logits, each, batch.mask, finite))
        second = jnp.where(finite[:, None], second, jnp.nan)
        known = mask & finite & jnp.isfinite(first).all(-1)
        usable = known & jnp.isfinite(second).all(-1)

        now, cooled = of.average(
            state.averages,
            jnp.where(usable[:, None], first, 0),
            jnp.where(usable[:, None], second, 0),
            usable,
            policy.half_life,
        )
        environment = environments.observe(state.environment, each, mask & finite, policy.recent)
        signals = of.signals_of(now) | {
            "environment": environments.largest_z(environment),
            "images": usable.sum(dtype=jnp.int32),
            "finite": ~own.metrics.get("skipped", jnp.zeros((), bool)),
            "broken": known.any() & ~usable.any(),
            **_labels(state, policy, canary),
        }
        verdict = decide(signals, state.strikes, state.stopped, policy)
        done = {name: verdict.decision == n for n, name in enumerate(DECISIONS)}
        away = done["forget"] | done["roll_back"] | done["stop"] | done["stopped"]
        updates = jnp.where(away, 0, state.updates + done["adapt"])
        learnt, ring = _carried(state, changing(inner), done, away, updates, policy)
        averages = optax.tree.where(away, jax.tree.map(jnp.zeros_like, now), now)
        fresh = environments.observe(environments.empty(dtype), each, mask & finite, policy.recent)
        environment = optax.tree.where(done["forget"], fresh, environment)
        review = optax.tree.where(done["forget"], no_pairs(), state.review)
        valid = mask.sum(dtype=jnp.int32)
        seen, checks = state.seen + valid, state.checks
        if canary is not None:
            due = seen // policy.canary_every > state.seen // policy.canary_every
            asked = canary, state.context.canary, adapter, params, put_back(state.inner, learnt)
            checks = check_canary(*asked, checks, due, policy.alpha)
        moved = GuardState(
            learnt, (), ring, averages, environment, checks, review,
            verdict.strikes, verdict.stopped, updates, seen, (),
        )  # fmt: skip
        old = state._replace(inner=changing(state.inner), context=(), fingerprint=())
        moved = optax.tree.where(valid > 0, moved, old)
        # Adaptation may say which images are of a class, not how many: the marginals are kept.
        wanted, found = of.log_marginals(now)
        balanced = cooled + wanted - found
        balanced = jnp.where(usable[:, None], balanced, jnp.nan)
        served = mix(first, balanced, verdict.share)
        said = {name: getattr(verdict, name) for name in ("share", "decision", "reason", "strikes")}
        said |= {"updates": updates, "distance": of.distance(learnt, state.context.source)}
        moved = moved._replace(
            inner=put_back(state.inner, moved.inner),
            context=state.context,
            fingerprint=state.fingerprint,
        )
        return moved, Prediction(
            served, own.metrics | signals | said, answers=Answers(first, second)
        )

    return Adapter(init, step)


def _labels(state: GuardState, policy: Policy, canary: Canary | None) -> Metrics:
    """The signals of labels: those of the stream's own images, and of a canary."""
    turned = Pairs(state.review.losses, state.review.ties, state.review.wins)
    signals = {
        "worse": is_worse(state.review, policy.alpha),
        "better": is_worse(turned, policy.alpha),
    }
    if canary is None:
        return signals
    last = state.checks.pairs
    gain = (last.wins - last.losses) / len(canary.labels)
    return signals | {"canary": gain, "canary_worse": state.checks.worse}


def _carried(
    state: GuardState, after: Any, done: Metrics, away: Array, updates: Array, policy: Policy
) -> tuple[Any, Any]:
    """What the adapter inside goes on with, and the snapshots, once it is decided."""
    source = state.context.source
    learnt = optax.tree.where(done["adapt"], after, changing(state.inner))
    keep = done["adapt"] & (updates % policy.snapshot_every == 0)
    ring = optax.tree.where(keep, pushed(state.snapshots, learnt), state.snapshots)
    # From the oldest snapshot; a second failure, when they are the source's, from the source.
    oldest = jax.tree.map(lambda x: x[0], state.snapshots)
    learnt = optax.tree.where(done["roll_back"], oldest, learnt)
    learnt = optax.tree.where(away & ~done["roll_back"], source, learnt)
    return learnt, optax.tree.where(away, repeated(source, policy.snapshots), ring)
