"""Sessions, their queue, watched folders and the review of images."""

import jax
import numpy as np
import pytest
from PIL import Image

import jaxtta
from jaxtta import adapters, models
from jaxtta.adapters.guard import DECISIONS
from jaxtta.deploy.session import Session

CLASSES = jaxtta.data.CIFAR10_CLASSES
BUNDLED = jaxtta.data.open_dataset("folder", jaxtta.assets.IMAGES)
IMAGES = [Image.fromarray(BUNDLED[200 * (n % 10) + n // 10]) for n in range(24)]


@pytest.fixture(scope="module")
def made(short):
    """Model, parameters, task, and adapters by name."""
    model, params = jaxtta.load(short)
    task = models.task_for(model, CLASSES, ("a photo of a {}.",))
    names = ("zero_shot", "tent:lr=0.01", "guarded:tent:lr=0.01", "vte")
    parsed = {name: adapters.parse_adapter(name) for name in names}
    return model, params, task, parsed


@pytest.fixture(scope="module")
def new(made):
    """Make a session of an adapter's name."""
    model, params, task, parsed = made

    def make(name, **more):
        spec = parsed[name]
        adapter = adapters.make_adapter(spec, model, task, adapters.AdapterConfig())
        more = {
            "batch_size": 4,
            "full_size": spec.needs_originals,
            "settings": {"adapter": name},
        } | more
        return Session(model, params, task, adapter, **more)

    return make


def run(session, images=IMAGES, size=4):
    numbers = range(len(images))
    batches = [numbers[start : start + size] for start in numbers[::size]]
    return [a for b in batches for a in session.answer([images[n] for n in b], b)]


class Records(list):
    write = list.append


@pytest.mark.parametrize("name", ["tent:lr=0.01", "guarded:tent:lr=0.01"])
def test_a_loaded_session_goes_on_to_the_bit(new, tmp_path, name):
    whole, records = new(name, digests=True), Records()
    expected = run(whole)
    first = new(name, digests=True)
    answers = run(first, IMAGES[:12])
    first.save(tmp_path / "state")
    second = new(name, log=records)
    begin = second.digest
    second.load(tmp_path / "state")
    assert second.digest == first.digest != begin
    answers += run(second, IMAGES[12:])
    for one, other in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)
        assert (one.step, one.updates, one.decision) == (other.step, other.updates, other.decision)
    assert (second.digest, second.seen, second.steps) == (whole.digest, 24, 6)
    assert [record["step"] for record in records] == [3, 4, 5]
    assert records[-1]["state_digest"] == whole.digest
    assert [x["label"] for x in records[-1]["served"]] == [CLASSES[a.label] for a in answers[-4:]]
    assert [a.updates for a in expected[::4]] == [0, 1, 2, 3, 4, 5]
    assert not np.array_equal(expected[-1].scores, run(new("zero_shot"), IMAGES[-1:])[0].scores)


def test_a_small_batch_is_answered_and_leaves_the_state(new):
    session = new("tent:lr=0.01", digests=True)
    before = session.digest
    few, plain = run(session, IMAGES[:3]), run(new("zero_shot"), IMAGES[:3])
    assert (session.digest, session.updates, session.seen) == (before, 0, 3)
    for one, other in zip(few, plain, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    eager = new("tent:lr=0.01", digests=True, min_adapt=3)
    run(eager, IMAGES[:3])
    assert (eager.digest != before, eager.updates) == (True, 1)


def test_a_guard_decides_on_small_batches_itself(new):
    session = new("guarded:tent:lr=0.01")
    answer = run(session, IMAGES[:3])[0]
    assert (answer.decision, session.updates) == ("skip", 0)
    answer = run(session, IMAGES[:4])[0]
    assert (answer.decision, session.updates) == ("adapt", 1)
    assert answer.decision in DECISIONS and 0 < answer.share <= 0.5 and answer.guarded
    assert answer.reference.sum() == pytest.approx(1) == answer.adapted.sum()


def test_answers_of_the_frozen_model_where_they_are_to_be_served(new):
    session = new("guarded:tent:lr=0.01", served=lambda name: int(name) % 2 == 0)
    learnt, plain = new("guarded:tent:lr=0.01"), new("zero_shot")
    for mixed, both, frozen in zip(run(session), run(learnt), run(plain), strict=True):
        same = both if mixed.guarded else frozen
        assert mixed.guarded == (mixed.name % 2 == 0)
        np.testing.assert_allclose(mixed.scores, same.scores, atol=1e-6)
        assert mixed.share == (both.share if mixed.guarded else 0)
        np.testing.assert_array_equal(mixed.adapted, both.adapted)


def test_images_may_be_prepared_before(new):
    session, other = new("vte"), new("vte")
    images = [IMAGES[0].resize((40, 60)), IMAGES[1], IMAGES[2].convert("L").resize((700, 90))]
    ready = [session.prepare(image) for image in images]
    assert [tuple(x.size) for x in ready] == [(60, 40), (32, 32), (66, 512)]
    assert ready[0].pixels.shape == (512, 512, 3)
    for one, two in zip(session.answer(ready, "abc"), other.answer(images, "abc"), strict=True):
        np.testing.assert_array_equal(one.scores, two.scores)
    assert [x.name for x in session.answer([np.asarray(IMAGES[0])], ["d"])] == ["d"]


def test_compiling_first_changes_nothing(new, caplog):
    session = new("guarded:tent:lr=0.01", digests=True)
    before = session.digest
    session.compile()
    assert (session.digest, session.steps, session.seen) == (before, 0, 0)
    with jax.log_compiles():
        run(session, IMAGES[:7])
    assert "Compiling jit(step)" not in caplog.text and "Compiling step" not in caplog.text


def test_what_does_not_fit_is_refused(new, tmp_path):
    session = new("tent:lr=0.01")
    for images, names in (([], []), (IMAGES[:5], "abcde"), (IMAGES[:2], "abc")):
        with pytest.raises(ValueError, match="images"):
            session.answer(images, names)
    with pytest.raises(ValueError, match="batch_size is 0"):
        new("zero_shot", batch_size=0)
    path = tmp_path / "state"
    session.save(path)
    with pytest.raises(
        ValueError, match=r"state: has adapter .tent:lr=0.01., expected .zero_shot."
    ):
        new("zero_shot").load(path)
    with pytest.raises(ValueError, match="has class names"):
        new("tent:lr=0.01", class_names=CLASSES[::-1]).load(path)
    jaxtta.save_state(path, session.state)
    with pytest.raises(ValueError, match="holds no session's state"):
        session.load(path)
    with pytest.raises(FileNotFoundError, match="gone: no such file"):
        session.load(tmp_path / "gone")


def test_the_state_of_another_model_is_refused(new, made, tmp_path):
    model, params, task, parsed = made
    new("tent:lr=0.01").save(tmp_path / "state")
    other = jax.tree.map(lambda x: x * 1.5, params)
    adapter = adapters.make_adapter(parsed["tent:lr=0.01"], model, task, adapters.AdapterConfig())
    session = Session(
        model, other, task, adapter, batch_size=4, settings={"adapter": "tent:lr=0.01"}
    )
    with pytest.raises(ValueError, match="is the state of another model"):
        session.load(tmp_path / "state")
