"""losses, metrics and tree against plain numpy."""

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtta import evaluate, losses, metrics, tree
from jaxtta.adapters.batclip import image_text_alignment, prototype_separation, prototypes

shapes = st.sampled_from([(1, 2), (12, 3), (5, 7)])  # images and classes; each compiles anew
logits_and_labels = st.tuples(shapes, st.integers(0, 2**32 - 1)).map(
    lambda t: (
        np.random.default_rng(t[1]).normal(size=t[0], scale=3).astype(np.float32),
        np.random.default_rng(t[1] + 1).integers(0, t[0][1], t[0][0]),
    )
)


def softmax(x):
    x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@hypothesis.given(logits_and_labels)
def test_scores_equal_numpys(case):
    logits, labels = case
    p = softmax(logits)
    own = p[np.arange(len(labels)), labels]
    np.testing.assert_allclose(losses.entropy(logits), -(p * np.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(metrics.nll(logits, labels), -np.log(own), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        metrics.brier(logits, labels), ((p - np.eye(p.shape[1])[labels]) ** 2).sum(-1), atol=1e-5
    )
    for k in (1, 2, 5):
        best = np.argsort(-logits, axis=-1)[:, :k]
        expected = (best == labels[:, None]).any(-1)
        np.testing.assert_array_equal(metrics.top_k(logits, labels, k), expected)


@hypothesis.given(shapes, st.integers(0, 2**32 - 1))
def test_a_tie_counts_for_the_lowest_index(shape, seed):
    """As argmax and a stable sort, with and without jit: published code counts so."""
    (batch, classes), rng = shape, np.random.default_rng(seed)
    logits = rng.integers(0, 3, (batch, classes)).astype(np.float32)  # most of them equal
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    labels = rng.integers(0, classes, batch)
    order = np.argsort(-logits, axis=-1, kind="stable")
    for k in (1, 2, 5):
        expected = (order[:, :k] == labels[:, None]).any(-1)
        np.testing.assert_array_equal(metrics.top_k(logits, labels, k), expected)
        jitted = jax.jit(metrics.top_k, static_argnums=2)
        np.testing.assert_array_equal(jitted(logits, labels, k), expected)
    scores = evaluate.score(logits, labels)
    np.testing.assert_array_equal(scores["top5"], metrics.top_k(logits, labels, 5))
    np.testing.assert_array_equal(scores["prediction"], logits.argmax(-1))


def test_logits_that_are_nan_are_never_right():
    logits = jnp.asarray([[np.nan, 0.0, 1.0], [np.nan, 0.0, 1.0], [np.nan] * 3])
    for k in (1, 5):
        assert not metrics.top_k(logits, jnp.asarray([0, 2, 1]), k).any()
    assert metrics.retrieval_recall(logits[:1], jnp.array([[True, False, False]]), 3) == 0


SCORES = (metrics.top_k, metrics.nll, metrics.brier, evaluate.score)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, -1], ValueError, "labels run from -1 to 0, expected 0 to 2"),
        ([3, 0], ValueError, "labels run from 0 to 3, expected 0 to 2"),
        ([0.0, 1.0], TypeError, "labels are float32, expected integers"),
        ([True, False], TypeError, "labels are bool, expected integers"),
        ([0, 1, 2], ValueError, r"labels have shape \(3,\), expected \(2,\)"),
        ([[0], [1]], ValueError, r"labels have shape \(2, 1\), expected \(2,\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(score, labels, error, message):
    logits = np.zeros((2, 3), np.float32)
    for given in (labels, np.asarray(labels, None), jnp.asarray(labels)):
        with pytest.raises(error, match=message.replace("float32", "float(32|64)")):
            score(logits, given)


@pytest.mark.parametrize("score", SCORES)
def test_logits_are_of_a_batch(score):
    for logits in (np.zeros(3), np.zeros((1, 2, 3))):
        with pytest.raises(ValueError, match=r"logits have shape .*, expected \(batch, classes\)"):
            score(logits, np.zeros(len(logits), int))


@pytest.mark.parametrize("score", SCORES)
def test_labels_of_any_integer_type(score):
    """More classes than the type counts, and a label that int32 would wrap to a class."""
    logits, labels = np.linspace(0, 1, 600, dtype=np.float32).reshape(2, 300), np.array([2, 255])
    expected = score(logits, labels)
    for kind in (np.uint8, np.int16, np.uint64):
        for function in (score, jax.jit(score)):
            jax.tree.map(
                np.testing.assert_array_equal, function(logits, labels.astype(kind)), expected
            )
    with pytest.raises(ValueError, match="labels run from 1 to 4294967296"):
        score(logits, np.array([2**32, 1]))


def test_traced_labels_that_are_no_classes_give_nan_and_are_never_right():
    logits, labels = jnp.zeros((3, 2)), jnp.array([-1, 2, 0])
    assert jax.jit(metrics.top_k)(logits, labels).tolist() == [False, False, True]
    for score in (metrics.nll, metrics.brier):
        assert np.isnan(jax.jit(score)(logits, labels)).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.2, 1.6], [True, False], "confidence holds 1.6"),
        ([0.2, -0.1], [True, False], "confidence holds -0.1"),
        ([0.2, np.nan], [True, False], "confidence holds nan"),
        ([80.0, 20.0], [True, False], "confidence holds 80.0"),
        ([0.2, 0.3], [1, 3], "correct holds 3"),
        ([0.2], [True, False], r"confidence has shape \(1,\) and correct \(2,\)"),
        ([[0.2, 0.8]], [[True, False]], r"expected \(images,\) for both"),
    ],
)
def test_confidences_that_are_no_probabilities_are_refused(confidence, correct, message):
    for error in (metrics.expected_calibration_error, metrics.reliability):
        with pytest.raises(ValueError, match=message):
            error(np.asarray(confidence), np.asarray(correct))
    if np.shape(confidence) == np.shape(correct) == (2,):  # traced: no figure that looks right
        traced = jax.jit(metrics.expected_calibration_error)
        assert np.isnan(traced(jnp.asarray(confidence), jnp.asarray(correct)))


def test_figures_in_per_cent_or_of_other_shapes_are_refused():
    errors = dict.fromkeys(metrics.ALEXNET_ERRORS, 0.5)
    with pytest.raises(ValueError, match=r"the error on fog is 50.0, expected a share in \[0, 1\]"):
        metrics.mean_corruption_error(errors | {"fog": 50.0})
    with pytest.raises(ValueError, match=r"accuracies have shape \(2, 3\)"):
        metrics.transfer(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"k is 4, expected 1 to the 3 candidates"):
        metrics.retrieval_recall(np.zeros((2, 3)), np.zeros((2, 3), bool), 4)
    with pytest.raises(ValueError, match=r"\(2, 3\) and matches \(3, 2\)"):
        metrics.retrieval_recall(np.zeros((2, 3)), np.zeros((3, 2), bool))
    with pytest.raises(ValueError, match="k is 0"):
        metrics.top_k(np.zeros((2, 3)), np.zeros(2, int), 0)


@hypothesis.given(
    hnp.arrays(np.float32, st.sampled_from([1, 7, 40]), elements=st.floats(0, 1, width=32)),
    st.integers(0, 2**32 - 1),
)
def test_calibration_error_equals_numpys(confidence, seed):
    correct = np.random.default_rng(seed).random(len(confidence)) < 0.5
    edges = np.linspace(0, 1, 16)
    expected = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high) | (low == 0) & (confidence == 0)
        # the bin of a confidence on an edge is a matter of rounding
        hypothesis.assume(not np.any(np.abs(confidence - high) < 1e-6) or high == 1)
        if inside.any():
            expected += abs(correct[inside].mean() - confidence[inside].mean()) * inside.mean()
    ours = metrics.expected_calibration_error(jnp.asarray(confidence), jnp.asarray(correct))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@hypothesis.given(shapes, st.integers(0, 2**32 - 1))
def test_batclip_terms_equal_numpys(shape, seed):
    (batch, classes), rng = shape, np.random.default_rng(seed)
    f, t = rng.normal(size=(batch, 5)), rng.normal(size=(classes, 5))
    t /= np.linalg.norm(t, axis=-1, keepdims=True)
    labels, mask = rng.integers(0, classes, batch), rng.random(batch) < 0.7
    present = [k for k in range(classes) if (mask & (labels == k)).any()]
    v = {k: f[mask & (labels == k)].mean(0) for k in present}
    u = {k: x / np.linalg.norm(x) for k, x in v.items()}
    alignment = sum(v[k] @ t[k] for k in present) / max(len(present), 1)
    separation = sum(1 - u[k] @ u[m] for k in present for m in present if k != m)
    means, there = prototypes(jnp.asarray(f), labels, mask, classes)
    assert list(np.flatnonzero(there)) == present
    np.testing.assert_allclose(image_text_alignment(means, there, t), alignment, atol=1e-5)
    np.testing.assert_allclose(prototype_separation(means, there), separation, atol=1e-4)


def test_absent_classes_poison_no_gradient():
    def loss(f):
        means, there = prototypes(f, jnp.zeros(3, int), jnp.array([True, True, False]), 4)
        return prototype_separation(means, there) + (means * there[:, None]).sum()

    gradient = jax.grad(loss)(jnp.array([[1.0, 2.0], [0.0, 1.0], [np.nan, np.inf]]))
    np.testing.assert_allclose(gradient, [[0.5, 0.5], [0.5, 0.5], [0, 0]])


def test_masked_mean_of_nothing_is_zero():
    value, slope = jax.value_and_grad(losses.masked_mean)(jnp.array([np.nan]), np.array([False]))
    assert value == 0
    assert slope == 0


PARAMS = {
    "vision_model": {"layer_norm1": {"scale": 1.0, "bias": 2.0}, "fc1": {"kernel": 3.0}},
    "text_model": {"final_layer_norm": {"scale": 4.0}, "norm_free": {"kernel": 5.0}},
    "logit_scale": 6.0,
}


@pytest.mark.parametrize(
    ("tower", "expected"), [("image", {1.0, 2.0}), ("text", {4.0}), ("both", {1.0, 2.0, 4.0})]
)
def test_partition_and_merge(tower, expected):
    chosen, others = tree.partition(PARAMS, tree.normalisation_parameters(tower))
    assert set(jax.tree.leaves(chosen)) == expected
    assert not set(jax.tree.leaves(others)) & expected
    assert tree.merge(others, chosen) == PARAMS
    assert tree.merge(PARAMS, chosen) == PARAMS
    changed = tree.merge(PARAMS, jax.tree.map(lambda x: -x, chosen))
    assert set(jax.tree.leaves(changed)) == {-x if x in expected else x for x in range(1, 7)}
    assert PARAMS["vision_model"]["layer_norm1"]["scale"] == 1.0


def test_bad_trees_are_refused():
    with pytest.raises(ValueError, match="no parameter is chosen; there are logit_scale"):
        tree.partition(PARAMS, lambda path: False)
    with pytest.raises(ValueError, match="tower is 'audio', expected one of image, text, both"):
        tree.normalisation_parameters("audio")
    with pytest.raises(ValueError, match="logit_scale is a leaf in one tree"):
        tree.merge(PARAMS, {"logit_scale": {"x": 1.0}})
    with pytest.raises(ValueError, match=r"logit_scale has shape \(2,\), expected \(\)"):
        tree.merge(PARAMS, {"logit_scale": jnp.ones(2)})


def test_select_is_bit_exact():
    a, b = {"x": jnp.array([np.nan, -0.0])}, {"x": jnp.array([1.0, 0.0])}
    np.testing.assert_array_equal(optax.tree.where(jnp.asarray(True), a, b)["x"], a["x"])
    assert np.signbit(optax.tree.where(jnp.asarray(True), a, b)["x"][1])
    assert not tree.all_finite(a)
    assert tree.all_finite(b)
    assert tree.all_finite({"i": jnp.arange(3)})
