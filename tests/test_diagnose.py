"""The diagnosis against plain numpy, on random and on planted data, and its laws."""

import functools
import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative

from jaxtta import diagnose, losses
from jaxtta.diagnose import RunningMean
from jaxtta.diagnose.check import answers_to

SEEDS = st.integers(0, 2**31 - 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def doubles(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(seed, size):
    """An orthogonal matrix."""
    return np.linalg.qr(doubles(seed, size, size))[0]


def in_pieces(of_batch, *arrays, sizes=(1, 7, 0, 5)):
    """What a batch function gives for pieces of arrays, padded with NaN to one shape."""
    starts = np.cumsum((0, *sizes, len(arrays[0]) - sum(sizes)))
    width = max(np.diff(starts))
    for start, stop in itertools.pairwise(starts):
        padded = [np.full((width, *a.shape[1:]), -99, a.dtype) for a in arrays]
        for to, array in zip(padded, arrays, strict=True):
            if to.dtype.kind == "f":
                to[:] = np.nan
            to[: stop - start] = array[start:stop]
        yield of_batch(*padded, mask=np.arange(width) < stop - start)


def merged(of_batch, *arrays):
    return functools.reduce(lambda a, b: a.merge(b), in_pieces(of_batch, *arrays))


# --- kurtosis and outliers


@hypothesis.given(SEEDS)
def test_kurtosis_is_the_fourth_standardised_moment(seed):
    features = normal(seed, 20, 48) ** 3
    wide = features.astype(np.float64)
    centred = wide - wide.mean(1, keepdims=True)
    expected = ((centred**4).mean(1) / (centred**2).mean(1) ** 2).mean()
    found = diagnose.activation_kurtosis(features)
    assert found == pytest.approx(expected, rel=1e-5)
    scipy = pytest.importorskip("scipy.stats")
    assert found == pytest.approx(scipy.kurtosis(wide, axis=1, fisher=False).mean(), rel=1e-5)
    # scale, offset, sign and order of entries and images are nothing to it
    random = np.random.default_rng(seed)
    scale, offset = np.exp(random.normal(size=(20, 1))), random.normal(size=(20, 1))
    other = (scale * features + offset)[random.permutation(20)][:, random.permutation(48)]
    assert diagnose.activation_kurtosis(-other) == pytest.approx(found, rel=1e-4)
    sums = merged(diagnose.kurtosis_stats, features)
    assert float(sums.mean()) == pytest.approx(found, rel=1e-5)
    assert int(sums.count) == 20


def test_kurtosis_of_known_distributions():
    features = normal(0, 50, 4096)
    assert diagnose.activation_kurtosis(features) == pytest.approx(3, abs=0.05)
    assert diagnose.activation_kurtosis(np.sign(features)) == pytest.approx(1, abs=0.01)
    lone = np.zeros((3, 101), np.float32)
    lone[:, 7] = 1  # z is √100 there and -1/√100 elsewhere
    assert diagnose.activation_kurtosis(lone) == pytest.approx((10**4 + 100 * 0.1**4) / 101)
    for scale in (1e-30, 1e30):  # fourth powers beyond float32
        assert diagnose.activation_kurtosis(scale * lone) == pytest.approx(99.0099, rel=1e-5)
    half = jnp.asarray(features, jnp.bfloat16)
    assert diagnose.activation_kurtosis(half) == pytest.approx(3, abs=0.05)


@hypothesis.given(SEEDS, st.integers(0, 6))
def test_planted_outlier_axes_are_found_exactly(seed, outliers):
    random = np.random.default_rng(seed)
    features = random.normal(size=(60, 512)).astype(np.float32)
    planted = np.sort(random.choice(512, outliers, replace=False))
    features[:, planted] += 40 * random.choice([-1, 1], outliers)
    decoy = random.choice(np.setdiff1d(np.arange(512), planted))
    features[:20, decoy] = 60  # in a third of the images only
    found = diagnose.outlier_features(features)
    np.testing.assert_array_equal(found.axes, planted)
    shares = np.zeros(512)
    shares[planted], shares[decoy] = 1, 1 / 3
    np.testing.assert_allclose(found.shares, shares, atol=1e-6)
    with_decoy = diagnose.outlier_features(features, share=0.3).axes
    np.testing.assert_array_equal(with_decoy, np.union1d(planted, decoy))
    assert (diagnose.activation_kurtosis(features[20:]) > 20) == (outliers > 0)
    order = random.permutation(60)
    np.testing.assert_array_equal(diagnose.outlier_features(features[order])[1], found.shares)
    streamed = diagnose.outlier_axes(merged(diagnose.outlier_stats, features))
    np.testing.assert_array_equal(streamed.axes, planted)
    np.testing.assert_array_equal(streamed.shares, found.shares)


def test_outliers_by_the_definition():
    features = normal(3, 40, 64)
    z = features - features.mean(1, keepdims=True)
    z /= z.std(1, keepdims=True)
    found = diagnose.outlier_features(features, threshold=1.0, share=0.35)
    shares = (np.abs(z) > 1).mean(0)
    np.testing.assert_allclose(found.shares, shares, atol=1e-6)
    np.testing.assert_array_equal(found.axes, np.flatnonzero(shares > 0.349))


@pytest.mark.parametrize("images", range(1, 10))
def test_the_share_itself_is_enough(images):
    features = normal(0, 10, 64)
    features[:images, 5] = 50
    for share, axes in ((images / 10, [5]), (images / 10 + 1e-6, [])):
        found = diagnose.outlier_features(features, share=share).axes
        np.testing.assert_array_equal(found, axes)


# --- directions


@hypothesis.given(SEEDS, st.sampled_from([(5, 12), (12, 5), (8, 8)]))
def test_importance_is_singular_value_times_cosine(seed, shape):
    head, features = normal(seed, *shape), normal(seed + 1, 30, shape[1])
    _, values, rows = np.linalg.svd(head.astype(np.float64), full_matrices=False)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = np.abs(unit @ rows.T).mean(0)
    order = np.argsort(-values * cosines)
    found = diagnose.privileged_directions(head, features, axes=[1, 3])
    assert relative(found.importance, (values * cosines)[order]) < 1e-5
    assert relative(found.singular_values, values[order]) < 1e-5
    assert relative(found.cosines, cosines[order]) < 1e-5
    assert relative(found.overlap, (rows[order][:, [1, 3]] ** 2).sum(1)) < 1e-4
    assert relative(found.spread, (values * cosines).std() / (values * cosines).mean()) < 1e-5
    np.testing.assert_allclose(np.abs((found.directions * rows[order]).sum(1)), 1, atol=1e-5)
    # neither the images' order and scale nor the sign of anything counts
    scales = np.exp(normal(seed + 2, 30, 1)) * np.sign(normal(seed + 3, 30, 1))
    again = diagnose.privileged_directions(-head, (features * scales)[::-1], [3, 1, 1])
    for one, other in zip(found, again, strict=True):
        np.testing.assert_allclose(np.abs(one), np.abs(other), atol=1e-4)
    signs = np.sign(normal(seed + 4, min(shape), 1))
    directions = signs * diagnose.head_directions(head)
    sums = merged(functools.partial(diagnose.cosine_stats, directions), features)
    streamed = diagnose.rank_directions(head, directions, sums, [1, 3])
    assert relative(streamed.importance, found.importance) < 1e-5
    assert relative(streamed.overlap, found.overlap) < 1e-5


@hypothesis.given(SEEDS)
def test_planted_dominant_direction_is_the_top_one(seed):
    random = np.random.default_rng(seed)
    planted = np.zeros(32)
    planted[[4, 9]] = [0.8, -0.6]
    head = random.normal(size=(10, 32)) + 6 * np.outer(random.normal(size=10) + 2, planted)
    features = random.normal(size=(80, 32)) + 20 * planted
    found = diagnose.privileged_directions(head, features, axes=[4, 9])
    assert abs(found.directions[0] @ planted) > 0.95
    assert found.importance[0] > 5 * found.importance[1]
    assert found.overlap[0] > 0.9
    assert found.overlap[1:].max() < 0.5
    assert found.spread > 1


def test_directions_that_are_all_equal_have_no_spread():
    found = diagnose.privileged_directions(2 * np.eye(4), np.ones((3, 4)))
    np.testing.assert_allclose(found.importance, 1, rtol=1e-6)  # 2 · 1/√4
    assert float(found.spread) == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(found.overlap, 0)


@hypothesis.given(SEEDS, st.integers(1, 6))
def test_a_head_of_known_rank_keeps_its_accuracy_down_to_it(seed, rank):
    head = normal(seed, 9, rank) @ normal(seed + 1, rank, 16)
    features = normal(seed + 2, 200, 16)
    labels = (features.astype(np.float64) @ head.T.astype(np.float64)).argmax(1)
    labels[:40] = (labels[:40] + 1) % 9  # so that the accuracy is 0.8
    directions = diagnose.privileged_directions(head, features).directions
    assert directions.shape == (9, 16)
    pruned = diagnose.prune_directions(head, directions, count=rank)
    assert relative(pruned, head) < 1e-5
    fractions = [count / 9 for count in (9, rank, 8, 1)]
    accuracies = diagnose.pruned_accuracy(head, directions, features, labels, fractions)
    np.testing.assert_allclose(accuracies[:2], 0.8, atol=0.011)  # a near tie may turn
    for fraction, accuracy in zip(fractions, accuracies, strict=True):
        part = diagnose.prune_directions(head, directions, fraction=fraction)
        assert np.linalg.matrix_rank(np.asarray(part, np.float64), tol=1e-3) <= round(9 * fraction)
        expected = ((features @ np.asarray(part).T).argmax(1) == labels).mean()
        assert accuracy == pytest.approx(expected, abs=0.011)
    of_batch = functools.partial(diagnose.pruning_stats, counts=(9, rank))
    streamed = merged(lambda f, y, mask: of_batch(head, directions, f, y, mask), features, labels)
    np.testing.assert_allclose(streamed.mean(), accuracies[:2], atol=1e-6)


def test_pruning_keeps_what_is_asked_for():
    head, directions = np.diag([3.0, 2.0, 1.0]), jnp.eye(3)
    np.testing.assert_allclose(
        diagnose.prune_directions(head, directions, count=2), np.diag([3.0, 2.0, 0.0])
    )
    for fraction, kept in ((0.01, 1), (0.34, 1), (0.6, 2), (1.0, 3)):
        by_count = diagnose.prune_directions(head, directions, count=kept)
        by_fraction = diagnose.prune_directions(head, directions, fraction=fraction)
        np.testing.assert_array_equal(by_fraction, by_count)
    accuracies = diagnose.pruned_accuracy(head, directions, np.eye(3), [0, 1, 2], [1.0, 0.67, 0.34])
    # an image without a direction left has three equal logits, and a tie is wrong
    np.testing.assert_allclose(accuracies, [1, 2 / 3, 1 / 3])


def test_pruning_goes_over_the_images_in_pieces():
    head, features = normal(0, 3, 4), normal(1, 5000, 4)
    labels = np.random.default_rng(2).integers(0, 3, 5000)
    found = diagnose.pruned_accuracy(head, jnp.eye(4), features, labels, [1.0])
    expected = ((features @ head.T).argmax(1) == labels).mean()
    assert found == pytest.approx(expected, abs=3e-4)


# --- effective robustness


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@hypothesis.given(st.floats(0.2, 2), st.floats(-2, 1), SEEDS)
def test_effective_robustness_is_recovered(slope, intercept, seed):
    random = np.random.default_rng(seed)
    base = random.uniform(0.3, 0.9, 12)
    shifted = sigmoid(slope * np.log(base / (1 - base)) + intercept)
    line = diagnose.fit_baseline(base, shifted)
    np.testing.assert_allclose(line, (slope, intercept), atol=1e-9)
    np.testing.assert_allclose(line.predict(base), shifted, atol=1e-12)
    gain = random.uniform(-0.5, 0.5, 12) * shifted * (1 - shifted)
    found = diagnose.effective_robustness(base, shifted + gain, line)
    np.testing.assert_allclose(found, gain, atol=1e-12)
    assert diagnose.effective_robustness(base[0], shifted[0], line) == pytest.approx(0, abs=1e-12)


def test_the_line_is_the_least_squares_one():
    base, shifted = np.random.default_rng(0).uniform(0.1, 0.9, (2, 30))
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    expected = np.polyfit(logit(base), logit(shifted), 1)
    np.testing.assert_allclose(diagnose.fit_baseline(base, shifted), expected, rtol=1e-9)


# --- concepts


def average_precision(truth, scores):
    """By its definition: the precision at every score, weighted by the recall gained there."""
    total, recall = 0.0, 0.0
    for score in np.unique(scores)[::-1]:
        chosen = scores >= score
        reached = truth[chosen].sum() / truth.sum()
        total += (reached - recall) * truth[chosen].mean()
        recall = reached
    return total


def some_concepts(seed, images, concepts, random_share=0.3):
    labels = np.random.default_rng(seed).random((images, concepts)) < random_share
    labels[0], labels[1] = True, False
    return labels


@hypothesis.given(SEEDS, st.booleans())
def test_precision_is_the_average_precision(seed, ties):
    scores, labels = normal(seed, 40, 5), some_concepts(seed, 40, 7)
    if ties:
        scores = np.round(scores)
        scores[:, 0] = 1  # a direction that tells nothing
    found = diagnose.concept_detectors(scores, labels, threshold=0.5)
    for (direction, concept), precision in np.ndenumerate(found.precision):
        truth, column = labels[:, concept], scores[:, direction]
        both = average_precision(truth, column), average_precision(truth, -column)
        assert precision == pytest.approx(max(both), rel=1e-12)
        assert both[0 if found.sign[direction, concept] > 0 else 1] == pytest.approx(precision)
    np.testing.assert_array_equal(found.detects, found.precision >= 0.5)
    np.testing.assert_array_equal(found.encoded, found.precision.max(0) >= 0.5)
    np.testing.assert_array_equal(found.per_direction, (found.precision >= 0.5).sum(1))
    # images' order, a direction's sign and any increasing map of scores do not count
    order = np.random.default_rng(seed).permutation(40)
    again = diagnose.concept_detectors(-np.arctan(scores)[order], labels[order].astype(int))
    np.testing.assert_allclose(again.precision, found.precision, rtol=1e-12)


def test_precision_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    for scores in (normal(0, 500, 6), np.round(2 * normal(1, 500, 6))):
        labels = some_concepts(2, 500, 4)
        found = diagnose.concept_detectors(scores, labels)
        for (direction, concept), sign in np.ndenumerate(found.sign):
            expected = sklearn.average_precision_score(
                labels[:, concept], sign * scores[:, direction]
            )
            assert found.precision[direction, concept] == pytest.approx(expected, rel=1e-9)


@hypothesis.given(SEEDS)
def test_planted_concepts_are_counted_exactly(seed):
    """Three concepts on two axes of a rotated space, a fourth that nothing detects."""
    random = np.random.default_rng(seed)
    labels = np.zeros((300, 4), bool)
    labels[:60, 0] = labels[100:150, 1] = labels[200:240, 2] = True
    labels[:, 3] = random.random(300) < 0.3
    scores = random.normal(size=(300, 8))
    scores[:, 2] += 30 * labels[:, 0] - 30 * labels[:, 1]  # both signs are used
    scores[:, 5] -= 30 * labels[:, 2]
    found = diagnose.concept_detectors(scores, labels)
    np.testing.assert_array_equal(found.encoded, [True, True, True, False])
    np.testing.assert_array_equal(found.per_direction, [0, 0, 2, 0, 0, 1, 0, 0])
    assert (found.sign[2, 0], found.sign[2, 1], found.sign[5, 2]) == (1, -1, -1)
    np.testing.assert_allclose(found.precision[[2, 2, 5], [0, 1, 2]], 1)
    turn = rotation(seed, 8)
    turned = diagnose.concept_detectors((scores @ turn) @ turn.T, labels)
    np.testing.assert_allclose(turned.precision, found.precision, atol=1e-9)


def test_shared_and_unique_concepts():
    first, second = np.array([True, True, False, False]), np.array([True, False, True, False])
    shared = diagnose.shared_concepts(first, second)
    np.testing.assert_array_equal(shared, [True, False, False, False])
    only = diagnose.unique_concepts(first, second), diagnose.unique_concepts(second, first)
    np.testing.assert_array_equal(only, [[False, True, False, False], [False, False, True, False]])
    np.testing.assert_array_equal(shared | only[0], first)


# --- similarity


def plain_cka(x, y):
    """By the Gram matrices of the images, the other way round."""
    x, y = (np.asarray(a, np.float64) - np.mean(a, 0, dtype=np.float64) for a in (x, y))
    k, m = x @ x.T, y @ y.T
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


@hypothesis.given(SEEDS)
def test_cka_is_that_of_the_gram_matrices_and_keeps_its_laws(seed):
    x = normal(seed, 60, 12) + 5 * normal(seed + 1, 12)
    y = np.tanh(x @ normal(seed + 2, 12, 20)) + normal(seed + 3, 60, 20)
    found = diagnose.linear_cka(x, y)
    assert found == pytest.approx(plain_cka(x, y), rel=1e-4)
    assert 0 < found < 1
    assert diagnose.linear_cka(y, x) == pytest.approx(found, rel=1e-5)
    moved = 3 * x @ rotation(seed, 12).astype(np.float32) + 7
    assert diagnose.linear_cka(moved, -0.1 * y) == pytest.approx(found, rel=1e-4)
    assert diagnose.linear_cka(x, moved) == pytest.approx(1, rel=1e-5)
    order = np.random.default_rng(seed).permutation(60)
    assert diagnose.linear_cka(x[order], y[order]) == pytest.approx(found, rel=1e-5)
    assert diagnose.linear_cka(x, y[order]) < found
    streamed = merged(diagnose.cross_moments, x, y)
    assert streamed.cka() == pytest.approx(found, rel=1e-5)
    whole = diagnose.cross_moments(x, y)
    for one, other in zip(streamed, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)
    assert relative(whole.xy, (x - x.mean(0)).T @ (y - y.mean(0))) < 1e-5


def test_double_precision_is_kept():
    x, y = (np.random.default_rng(seed).normal(size=(50, 6)) + 100 for seed in (0, 1))
    with jax.enable_x64(True):
        assert diagnose.linear_cka(x, y) == pytest.approx(plain_cka(x, y), rel=1e-10)
        scipy = pytest.importorskip("scipy.stats")
        expected = scipy.kurtosis(x, axis=1, fisher=False).mean()
        assert diagnose.activation_kurtosis(x) == pytest.approx(expected, rel=1e-10)


def test_batches_of_one_shape_compile_once():
    features, mask = normal(0, 13, 41), np.arange(13) < 9
    of_batch = jax.jit(chex.assert_max_traces(lambda x, m: diagnose.kurtosis_stats(x, m), n=1))
    for batch in (features, -features, 2 * features):
        assert int(of_batch(batch, mask).count) == 9


def test_the_modality_gap_is_the_planted_offset():
    images, texts, offset = normal(0, 50, 8), normal(1, 6, 8), normal(2, 8)
    images += texts.mean(0) + offset - images.mean(0)
    gap = np.linalg.norm(images.astype(np.float64).mean(0) - texts.astype(np.float64).mean(0))
    found = diagnose.modality_gap(images, texts)
    assert float(found) == pytest.approx(gap, rel=1e-5)
    assert float(found) == pytest.approx(np.linalg.norm(offset), rel=1e-5)
    streamed = (images[:30].sum(0) + images[30:].sum(0))[None] / 50
    assert float(diagnose.modality_gap(streamed, texts)) == pytest.approx(gap, rel=1e-5)


# --- distribution shift


def plain_discrepancy(x, y, bandwidth):
    """The definition, sum by sum."""

    def k(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * bandwidth**2))

    n, m = len(x), len(y)
    within = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    others = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within + others - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@hypothesis.given(SEEDS)
def test_the_discrepancy_is_its_definition(seed):
    x, y = doubles(seed, 9, 4), doubles(seed + 1, 6, 4) + 0.5
    both = np.concatenate([x, y])
    distance = pytest.importorskip("scipy.spatial.distance")
    found = diagnose.mmd(x, y, permutations=50)
    assert found.bandwidth == pytest.approx(np.median(distance.pdist(both)), rel=1e-9)
    assert found.squared == pytest.approx(plain_discrepancy(x, y, found.bandwidth), abs=1e-12)
    # the permutations are the estimate for other deals
    rng = np.random.default_rng(0)
    for value in found.permuted[:3]:
        order = rng.permutation(15)
        dealt = np.isin(np.arange(15), order[:9])
        again = diagnose.mmd(both[dealt], both[~dealt], bandwidth=found.bandwidth, permutations=1)
        assert value == pytest.approx(again.squared, abs=1e-12)
    # either set may come first; place and, with the bandwidth, scale are nothing to it
    for a, b in ((y, x), (10 + 3 * x, 10 + 3 * y)):
        other = diagnose.mmd(a, b, permutations=1)
        assert other.squared == pytest.approx(found.squared, abs=1e-9)


def test_the_p_value_finds_what_is_there_and_nothing_else():
    p = [diagnose.mmd(*doubles(s, 2, 30, 5), permutations=99).p_value for s in range(99)]
    assert 0 <= np.mean(np.array(p) <= 0.1) <= 0.2  # uniform if nothing is there
    assert 0.4 <= np.mean(p) <= 0.6
    wider = diagnose.mmd(doubles(0, 60, 5), 2 * doubles(1, 60, 5))
    moved = diagnose.mmd(doubles(0, 60, 5), doubles(1, 60, 5) + 1)
    assert wider.p_value == moved.p_value == 1 / 501
    assert wider.squared > wider.null_quantile


@pytest.mark.parametrize(("images", "most", "drawn"), [(30, 1000, 30), (90, 1000, 40), (90, 7, 7)])
def test_a_half_of_the_reference_is_the_yardstick(images, most, drawn, monkeypatch):
    sizes = []
    whole = diagnose.target.mmd

    def spy(x, y, **options):
        sizes.append((len(x), len(y)))
        assert not {tuple(row) for row in x} & {tuple(row) for row in y}
        return whole(x, y, **options)

    monkeypatch.setattr(diagnose.target, "mmd", spy)
    target, half = diagnose.mmd_to_reference(
        doubles(0, images, 6) + 1, doubles(1, 80, 6), most=most
    )
    assert sizes == [(drawn, drawn)] * 2
    assert target.bandwidth == half.bandwidth
    assert target.squared > half.squared
    assert target.p_value < half.p_value


@hypothesis.given(SEEDS)
def test_confused_classes_are_counted(seed):
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(5), 40)
    found = diagnose.confused_classes(probabilities)
    counts: dict[tuple[int, int], list[float]] = {}
    for row in probabilities:
        second, first = np.argsort(row)[-2:]
        pair = min(first, second), max(first, second)
        counts.setdefault(pair, []).append(row[first] - row[second])
    assert len(found.classes) == len(counts)
    doubts = found.shares * (1 - found.margins)
    assert (np.diff(doubts) <= 1e-12).all()
    for pair, share, margin in zip(*found, strict=True):
        margins = counts[tuple(pair)]
        assert share == pytest.approx(len(margins) / 40)
        assert margin == pytest.approx(np.mean(margins))


@hypothesis.given(SEEDS)
def test_the_distance_of_an_image_is_that_of_a_near_one(seed):
    distance = pytest.importorskip("scipy.spatial.distance")
    target, reference = doubles(seed, 9, 4), doubles(seed + 1, 6, 4)
    every = np.sort(distance.cdist(target, reference), 1)
    for k in (1, 3, 6):
        found = diagnose.neighbour_distances(target, reference, neighbour=k)
        np.testing.assert_allclose(found, every[:, k - 1], rtol=1e-4, atol=1e-3)
    many = np.tile(target, (300, 1))  # in parts
    again = diagnose.neighbour_distances(many, reference, neighbour=6)
    np.testing.assert_allclose(again, np.tile(every[:, -1], 300), rtol=1e-4, atol=1e-3)


def test_answers_have_the_order_of_the_dataset():
    rows, reference = doubles(0, 5, 4), doubles(1, 20, 4)
    logits, others = doubles(2, 5, 3), doubles(3, 20, 3)
    features = diagnose.FeatureSet(rows, np.zeros(5, int), [], np.array([7, 2, 9, 0, 4]))
    found = answers_to(features, logits, reference, others)
    order = [3, 1, 4, 0, 2]
    assert found.numbers.tolist() == [0, 2, 4, 7, 9]
    np.testing.assert_array_equal(found.labels, logits.argmax(1)[order])
    entropies = np.asarray(losses.entropy(logits))[order]
    np.testing.assert_allclose(found.entropies, entropies)
    assert found.least_sure(2).tolist() == np.argsort(-entropies)[:2].tolist()
    assert len(found.reference_entropies) == 20
    for near, k in ((reference, 10), (reference[:3], 3)):  # of few the farthest is taken
        found = answers_to(features, logits, near, others)
        distances = diagnose.neighbour_distances(rows, near, neighbour=k)
        np.testing.assert_allclose(found.distances, distances[order])


# --- bad input

GOOD = normal(0, 6, 40)
HEAD = normal(1, 3, 40)
BAD = "not finite"


def spoilt(value):
    features = GOOD.copy()
    features[[1, 4]] = value
    return features


@pytest.mark.parametrize("value", [0.0, 0.1, np.nan, np.inf])
def test_features_without_a_value(value):
    message = "2 of 6 images have features that are constant or not finite"
    features = spoilt(value)
    with pytest.raises(ValueError, match=message):
        diagnose.activation_kurtosis(features)
    with pytest.raises(ValueError, match=message):
        diagnose.outlier_features(features)
    if value != 0.1:
        with pytest.raises(ValueError, match="2 of 6 images have features that are zero or not"):
            diagnose.privileged_directions(HEAD, features)
    if not np.isfinite(value):
        with pytest.raises(ValueError, match="features have entries that are not finite"):
            diagnose.linear_cka(features, GOOD)
        with pytest.raises(ValueError, match="2 of 6 images have a label outside 0 to 2 or feat"):
            diagnose.pruned_accuracy(HEAD, jnp.eye(40), features, np.zeros(6, int))


LINE = diagnose.LogitLinearBaseline(1.0, 0.0)
SOME = some_concepts(0, 6, 3)
SECOND = np.array([False, True, False])
EYE, LABELS = jnp.eye(40), [0, 1, 2, 0, 1, 2]
SMALL = GOOD[:, :4]
prune, pruned = diagnose.prune_directions, diagnose.pruned_accuracy
detect = diagnose.concept_detectors
rank, distances = diagnose.privileged_directions, diagnose.neighbour_distances


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagnose.activation_kurtosis(GOOD[0]), r"shape \(40,\), expected \(images, d\)"),
        (lambda: diagnose.activation_kurtosis(GOOD[:0]), "a mean over no images"),
        (lambda: diagnose.outlier_features(GOOD[:, :30]), "threshold is 6.0, .* below 5.39"),
        (lambda: diagnose.outlier_features(GOOD, threshold=0.0), "threshold is 0.0, expected a"),
        (lambda: diagnose.outlier_features(GOOD, share=0.0), "share is 0.0, expected a number abo"),
        (lambda: diagnose.outlier_features(GOOD[:0]), "a mean over no images"),
        (lambda: rank(HEAD, GOOD[:0]), "a mean over no images"),
        (lambda: rank(HEAD[:1], GOOD), r"the head has shape \(1, 40\)"),
        (lambda: rank(0 * HEAD, GOOD), "the head is zero or has"),
        (lambda: rank(np.nan * HEAD, GOOD), "the head is zero or has"),
        (lambda: rank(HEAD, GOOD[:, 1:]), r"have shape \(6, 39\), expected \(images, 40\)"),
        (lambda: rank(HEAD, GOOD, [0, 40]), r"axes \[0, 40\] are not all below 40"),
        (lambda: rank(HEAD, GOOD, [-1]), r"axes \[-1\] are not all"),
        (lambda: prune(HEAD, EYE), "count or a fraction"),
        (lambda: prune(HEAD, EYE, count=1, fraction=0.5), "either a count or a fraction"),
        (
            lambda: prune(HEAD, jnp.eye(39), count=1),
            r"\(3, 40\) does not match dir.* \(39, 39",
        ),
        (lambda: prune(HEAD, EYE, count=0), "count is 0, expected 1 t"),
        (lambda: pruned(HEAD, EYE, GOOD, LABELS, [1.5]), "is 1.5, expected .* above 0, at most 1"),
        (lambda: pruned(HEAD, EYE, GOOD, LABELS[:3]), r"labels \(3,\) do not match 6 images"),
        (lambda: pruned(HEAD, EYE, GOOD, [0, 1, 2, 3, -1, 0]), "2 of 6 .* a label outside 0 to 2"),
        (lambda: pruned(HEAD, EYE, GOOD[:0], np.zeros(0, int)), "a mean over no images"),
        (lambda: diagnose.fit_baseline([0.5], [0.4]), "at least two reference points"),
        (lambda: diagnose.fit_baseline([0.5, 0.5], [0.4, 0.3]), "at least two reference points"),
        (lambda: diagnose.fit_baseline([], []), "at least two reference points"),
        (lambda: diagnose.fit_baseline([0.5, 0.6], [0.4]), r"\(2,\) do not match shifted acc.*"),
        (lambda: diagnose.fit_baseline([0.5, 1.0], [0.4, 0.5]), "an accuracy is 1.0, expected"),
        (lambda: diagnose.effective_robustness(0.5, 0.0, LINE), "an accuracy is 0.0, expected a"),
        (lambda: diagnose.effective_robustness([63.2], [0.4], LINE), "an accuracy is 63.2, expect"),
        (lambda: LINE.predict(np.nan), "an accuracy is nan, expected a number between 0 and 1"),
        (lambda: detect(GOOD, SOME[:5]), r"labels \(5, 3\) do not match scores \(6, 40\)"),
        (lambda: detect(GOOD, SOME[:, 0]), r"labels \(6,\) do not match"),
        (lambda: detect(GOOD, 2 * SOME), "neither true nor false"),
        (lambda: detect(GOOD, SOME | SECOND), r"concepts \[1\] are in all images or in none"),
        (lambda: detect(GOOD, SOME & SECOND), r"concepts \[0, 2\] are in all images or in none"),
        (lambda: detect(spoilt(np.nan), SOME), "scores of direction 0 are not finite"),
        (lambda: diagnose.shared_concepts(SOME[0], SOME[0, :2]), r"concepts \(3,\) do not match"),
        (lambda: diagnose.linear_cka(GOOD, GOOD[1:]), "features of 6 and of 5 images do not"),
        (lambda: diagnose.linear_cka(GOOD[:0], GOOD[:0]), "similarity over 0 images, expected"),
        (lambda: diagnose.linear_cka(GOOD[:1], GOOD[:1]), "similarity over 1 images, expected"),
        (lambda: diagnose.linear_cka(GOOD, np.full((6, 3), 0.1)), "the same for all images"),
        (lambda: diagnose.mmd(SMALL, SMALL[:1]), r"\(6, 4\) and \(1, 4\), expected two"),
        (lambda: diagnose.mmd(SMALL, SMALL[:, 1:]), r"\(6, 4\) and \(6, 3\), expected two"),
        (lambda: diagnose.mmd(SMALL, SMALL[0]), r"\(6, 4\) and \(4,\), expected two"),
        (lambda: diagnose.mmd(SMALL, np.nan * SMALL), "entries that are not finite"),
        (lambda: diagnose.mmd(0 * SMALL, 0 * SMALL), "the same for most images"),
        (lambda: diagnose.mmd(SMALL, SMALL, bandwidth=0), "bandwidth is 0, expected a"),
        (lambda: diagnose.mmd(SMALL, SMALL, permutations=0), "permutations is 0, exp"),
        (lambda: diagnose.mmd_to_reference(SMALL, SMALL[:3]), "the reference has 3 images, exp"),
        (lambda: distances(SMALL, SMALL[:, 1:]), r"\(6, 4\) and \(6, 3\), expected"),
        (lambda: distances(SMALL, SMALL), "neighbour is 10, expected 1 to 6"),
        (lambda: distances(np.nan * SMALL, SMALL, neighbour=1), "not finite"),
        (lambda: diagnose.confused_classes(SMALL[:, :1]), r"shape \(6, 1\), expected \(images, c"),
        (lambda: diagnose.confused_classes(SMALL[:0]), r"shape \(0, 4\), expected \(images, cl"),
        (lambda: diagnose.confused_classes(np.nan * SMALL), "probabilities are not all in"),
        (lambda: diagnose.confused_classes(np.array([[3.0, 1.0]])), r"not all in \[0, 1\]: jax.nn"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_sums_without_a_value_say_so():
    sums = RunningMean(jnp.asarray(5), jnp.zeros(2), jnp.asarray(2))
    with pytest.raises(ValueError, match="2 of 5 images"):
        sums.mean()
