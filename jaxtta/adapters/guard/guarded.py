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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtta.adapters.base import Adapter, Answers, Array, Prediction, require_state
from jaxtta.adapters.guard import image_statistics as environments
from jaxtta.adapters.guard import signals as of
from jaxtta.adapters.guard.mixture import mix
from jaxtta.adapters.guard.policy import DECISIONS, Policy, decide
from jaxtta.adapters.on_features import gathered
from jaxtta.models import Batch, as_batch

FIXED = ("context", "fingerprint")
"""Fields of states that no step writes."""


CAREFUL = Policy()


class GuardContext(NamedTuple):
    """What no step writes.

    Attributes:
        reference: the state of the frozen model's adapter: its class embeddings.
        source: what the adapter inside changes, as it was in the beginning.
    """

    reference: Any
    source: Any


class GuardState(NamedTuple):
    """What a guard carries from batch to batch; donate it to the jitted step.

    Attributes:
        inner: the state of the adapter inside.
        context: what no step writes; `vmap` over streams may broadcast it (`stream_axes`).
        snapshots: earlier states of the adapter inside, without what no step writes, the oldest
            first: each leaf has an axis more.
        averages: of both models' answers.
        environment: the statistics of the images.
        strikes: () int32, failures in this environment.
        stopped: () bool, whether adaptation has ended.
        updates: () int32, batches learnt from since the last reset.
        seen: () int32, valid images so far.
        fingerprint: () uint32, as in `adapters.State`.
    """

    inner: Any
    context: Any
    snapshots: Any
    averages: of.Averages
    environment: environments.Environment
    strikes: Any
    stopped: Any
    updates: Any
    seen: Any
    fingerprint: Any = None


def changing(state: Any) -> Any:
    """A state without the fields that no step writes."""
    if not hasattr(state, "_fields"):
        return state
    fields = {name: changing(value) for name, value in state._asdict().items()}
    return state._replace(**{name: () if name in FIXED else x for name, x in fields.items()})


def put_back(state: Any, part: Any) -> Any:
    """A state with what `changing` gave, of it or of an earlier one, in its place."""
    if not hasattr(state, "_fields"):
        return part
    fields = zip(state._fields, state, part, strict=True)
    return state._replace(**{n: x if n in FIXED else put_back(x, y) for n, x, y in fields})


def stream_axes(state: Any) -> Any:
    """Axes for `vmap` over streams: 0, and None for what no step writes, which all share.

    Args:
        state: any adapter's, from `init(params)`.

    Returns:
        The state with an axis in the place of each leaf.
    """
    own = jax.tree.map(lambda x: 0, changing(state))
    return put_back(jax.tree.map(lambda x: None, state), own)


def guarded(
    adapter: Adapter, reference: Adapter, policy: Policy = CAREFUL, *, canary: Any = None
) -> Adapter:
    """Guard an adapter: serve a mixture with the frozen model, and take back what harms.

    A fully masked batch leaves the state as it was, bit for bit. The adapter inside does not learn
    from images that are not finite; their answers are the frozen model's.

    Args:
        adapter: any adapter; one that has nothing to roll back has answers to mix.
        reference: the frozen model, `zero_shot(model, task)`.
        policy: when to mix, skip, forget, roll back and stop.
        canary: labelled images that both models are tried on.

    Returns:
        The adapter. Its predictions have `answers`, both models' logits, and metrics beside those
        of the adapter inside: share, decision, reason, strikes, updates and the signals.

    Raises:
        TypeError: if an argument is of another kind.
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
        ring = jax.tree.map(lambda x: jnp.stack([x] * policy.snapshots), source)
        zero = jnp.zeros((), jnp.int32)
        return GuardState(
            inner,
            GuardContext(frozen, source),
            ring,
            jax.tree.map(jnp.copy, of.no_averages(logits.shape[-1], dtype)),
            jax.tree.map(jnp.copy, environments.empty(dtype)),
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
        usable = mask & jnp.isfinite(first).all(-1) & jnp.isfinite(second).all(-1)

        now, cooled = of.average(
            state.averages, *(jnp.where(usable[:, None], x, 0) for x in (first, second)),
            usable, policy.half_life,
        )  # fmt: skip
        environment = environments.observe(state.environment, each, mask & finite, policy.recent)
        signals = of.signals_of(now) | {
            "environment": environments.largest_z(environment),
            "images": usable.sum(dtype=jnp.int32),
            "finite": ~own.metrics.get("skipped", jnp.zeros((), bool)),
        }
        verdict = decide(signals, state.strikes, state.stopped, policy)
        done = {name: verdict.decision == n for n, name in enumerate(DECISIONS)}

        before, after, source = changing(state.inner), changing(inner), state.context.source
        away = done["forget"] | done["roll_back"] | done["stop"] | done["stopped"]
        anew = away & ~done["roll_back"]
        oldest = jax.tree.map(lambda x: x[0], state.snapshots)
        learnt = optax.tree.where(done["adapt"], after, before)
        learnt = optax.tree.where(done["roll_back"], oldest, learnt)
        learnt = optax.tree.where(anew, source, learnt)
        updates = jnp.where(away, 0, state.updates + done["adapt"])
        keep = done["adapt"] & (updates % policy.snapshot_every == 0)
        pushed = jax.tree.map(
            lambda old, new: jnp.concatenate([old[1:], new[None]]), state.snapshots, learnt
        )
        sources = jax.tree.map(lambda x, ring: jnp.broadcast_to(x, ring.shape), source, pushed)
        ring = optax.tree.where(keep, pushed, state.snapshots)
        ring = optax.tree.where(away, sources, ring)
        none = jax.tree.map(jnp.zeros_like, now)
        averages = optax.tree.where(away, none, now)
        fresh = environments.observe(environments.empty(dtype), each, mask & finite, policy.recent)
        environment = optax.tree.where(done["forget"], fresh, environment)

        valid = mask.sum(dtype=jnp.int32)
        moved = GuardState(
            learnt, (), ring, averages, environment,
            verdict.strikes, verdict.stopped, updates, state.seen + valid, (),
        )  # fmt: skip
        old = state._replace(inner=before, context=(), fingerprint=())
        moved = optax.tree.where(valid > 0, moved, old)
        wanted, found = of.log_marginals(now)
        balanced = cooled + policy.balance * (wanted - found)
        balanced = jnp.where(usable[:, None], balanced, jnp.nan)
        served = mix(first, balanced, verdict.share)
        metrics = (
            own.metrics
            | signals
            | {
                "distance": of.distance(learnt, source),
                "share": verdict.share,
                "decision": verdict.decision,
                "reason": verdict.reason,
                "strikes": verdict.strikes,
                "updates": updates,
            }
        )
        moved = moved._replace(
            inner=put_back(state.inner, moved.inner),
            context=state.context,
            fingerprint=state.fingerprint,
        )
        return moved, Prediction(served, metrics, answers=Answers(first, second))

    return Adapter(init, step)
