"""Tests with few labels whether adaptation harms: their errors, their power, and the canary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from jaxtta.adapters.base import Adapter, Prediction
from jaxtta.adapters.guard import canary, labels
from jaxtta.adapters.guard.canary import Canary
from jaxtta.adapters.guard.labels import Pairs

counts = st.builds(Pairs, *[st.integers(0, 300).map(jnp.int32)] * 3)
evidence = jax.jit(labels.log_evidence)
bounds = jax.jit(labels.bounds)
sign_test = jax.jit(labels.sign_test)


def run(rng, wins, losses, runs=1000, length=400):
    """Counts after each of the labels, (runs, length)."""
    drawn = rng.choice([1, 0, -1], (runs, length), p=[wins, 1 - wins - losses, losses])
    return Pairs(*(jnp.asarray((drawn == x).cumsum(1), jnp.int32) for x in (1, 0, -1)))


def over_all(function):
    return jax.jit(jax.vmap(jax.vmap(function)))


ever_worse = over_all(labels.is_worse)


@pytest.mark.parametrize(("wins", "losses"), [(0.1, 0.1), (0.5, 0.5), (0.3, 0.2)])
def test_a_model_that_is_no_worse_is_rarely_accused(wins, losses):
    pairs = run(np.random.default_rng(0), wins, losses)
    wrong = np.asarray(ever_worse(pairs)).any(1).mean()
    assert wrong <= 0.05  # at any of 400 times, in 1000 runs; the bound is not tight


def test_a_model_that_is_worse_is_found_and_one_within_the_margin_is_not():
    pairs = run(np.random.default_rng(1), 0.05, 0.25, runs=200, length=200)
    first = np.asarray(ever_worse(pairs)).argmax(1)
    assert np.median(first) < 80
    within = over_all(lambda x: labels.is_worse(x, margin=0.2))
    assert np.asarray(within(pairs)).any(1).mean() <= 0.05


@pytest.mark.parametrize(("wins", "losses"), [(0.1, 0.1), (0.02, 0.3), (0.0, 1.0)])
def test_bounds_hold_at_all_times(wins, losses):
    pairs = run(np.random.default_rng(2), wins, losses, runs=100, length=100)
    low, high = (np.asarray(x) for x in over_all(labels.bounds)(pairs))
    inside = (low <= wins - losses) & (wins - losses <= high)
    assert inside.all(1).mean() >= 0.95
    assert (high - low)[:, -1].mean() < 0.6 * (high - low)[:, 20].mean()


@given(counts)
def test_bounds_are_in_order_and_agree_with_the_test(pairs):
    low, high = map(float, bounds(pairs))
    total = sum(map(int, pairs))
    mean = (int(pairs.wins) - int(pairs.losses)) / max(total, 1)
    assert -1 <= low <= mean <= high <= 1
    turned = [float(x) for x in bounds(Pairs(pairs.losses, pairs.ties, pairs.wins))]
    assert np.allclose(turned, [-high, -low], atol=1e-5)
    assert bool(labels.is_worse(pairs, 0.025)) == (high < 0) or abs(high) < 1e-5


@given(counts, st.floats(-0.9, 0.8), st.floats(0, 0.1))
def test_evidence_grows_with_the_difference_and_ties_alone_pay_nothing(pairs, difference, more):
    low, high = float(evidence(pairs, difference)), float(evidence(pairs, difference + more))
    assert np.isfinite(low)
    assert low <= high + 1e-3 * (1 + abs(high))
    with_ties = pairs._replace(ties=pairs.ties + 50)
    assert float(evidence(with_ties)) == float(evidence(pairs))


@given(counts)
def test_the_sign_test_is_the_binomial_one(pairs):
    wins, losses = int(pairs.wins), int(pairs.losses)
    expected = 1.0
    if losses:
        expected = binomtest(losses, wins + losses, 0.5, alternative="greater").pvalue
    assert float(sign_test(pairs)) == pytest.approx(expected, rel=1e-3, abs=1e-7)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_masked_pairs_do_not_count_and_batches_add_up(rows):
    adapted, frozen, mask = np.array(rows).T
    pairs = labels.count_pairs(adapted, frozen, mask)
    kept = labels.count_pairs(adapted[mask], frozen[mask])
    halves = labels.add(
        labels.count_pairs(adapted[::2], frozen[::2], mask[::2]),
        labels.count_pairs(adapted[1::2], frozen[1::2], mask[1::2]),
    )
    assert pairs == kept == halves
    assert sum(map(int, pairs)) == mask.sum()


def test_looking_again_and_again_rarely_accuses():
    rng = np.random.default_rng(3)
    drawn = rng.choice([1, 0, -1], (2000, 20, 32), p=[0.2, 0.6, 0.2])

    @jax.jit
    @jax.vmap
    def looks(outcomes):
        def look(checks, now):
            return canary.check_again(checks, labels.count_pairs(now > 0, now < 0)), None

        return jax.lax.scan(look, canary.no_checks(), outcomes)[0]

    checks = looks(jnp.asarray(drawn))
    assert (np.asarray(checks.number) == 20).all()
    assert np.asarray(checks.worse).mean() <= 0.05
    worse = rng.choice([1, 0, -1], (200, 3, 32), p=[0.05, 0.35, 0.6])
    assert np.asarray(looks(jnp.asarray(worse)).worse).mean() > 0.95


# Its "parameters" are what it answers to every image.
def step(params, state, images):
    return state + 1, Prediction(jnp.tile(params, (len(images), 1)), {})


ADAPTER = Adapter(lambda params, key=None: jnp.zeros(()), step)
CANARY = Canary(np.zeros((12, 4, 4, 3), np.uint8), np.zeros(12, int))


def test_a_canary_finds_the_harm_when_it_is_due():
    right, wrong = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    frozen = CANARY.right(ADAPTER, right, jnp.zeros(()))
    assert frozen.all()

    @jax.jit
    def look(params, checks, due):
        state = jnp.zeros(())
        return canary.check_canary(CANARY, frozen, ADAPTER, params, state, checks, due)

    checks = look(right, canary.no_checks(), True)
    assert (int(checks.number), bool(checks.worse), float(checks.p)) == (1, False, 1.0)
    assert look(wrong, checks, False) == checks
    found = look(wrong, checks, True)
    assert (int(found.pairs.losses), bool(found.worse)) == (12, True)
    assert bool(look(right, found, True).worse)  # it stays found
    nan = look(jnp.array([jnp.nan, 0.0]), checks, True)
    assert bool(nan.worse)
    both = jax.vmap(look, in_axes=(0, None, 0))(
        jnp.stack([wrong, wrong]), checks, jnp.array([True, False])
    )
    assert both.worse.tolist() == [True, False]


@pytest.mark.parametrize(
    ("images", "given", "error", "message"),
    [
        (np.zeros((0, 4, 4, 3)), np.zeros(0, int), ValueError, r"shape \(0, 4, 4, 3\)"),
        (np.zeros((4, 4, 3)), np.zeros(4, int), ValueError, r"expected \(images, h, w, 3\)"),
        (np.zeros((2, 4, 4, 3)), np.zeros(3, int), ValueError, "one label for each image"),
        (np.zeros((2, 4, 4, 3)), None, ValueError, "one label for each image"),
        (np.zeros((2, 4, 4, 3)), np.zeros(2), TypeError, "expected indices of classes"),
        (np.zeros((2, 4, 4, 3)), np.array([0, -1]), ValueError, "label -1"),
    ],
)
def test_a_bad_canary_is_refused(images, given, error, message):
    with pytest.raises(error, match=message):
        Canary(images, given)


def test_a_label_that_is_no_class_is_refused():
    odd = Canary(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 2]))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        jax.jit(lambda params: odd.right(ADAPTER, params, jnp.zeros(())))(jnp.zeros(2))
