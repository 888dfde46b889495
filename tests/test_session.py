"""Sessions, their queue, watched folders and the review of images."""

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import jaxtta
from jaxtta import adapters, models
from jaxtta.adapters.guard import DECISIONS
from jaxtta.cli import serve
from jaxtta.deploy.answers import Answer, AnswersFile
from jaxtta.deploy.queue import BatchQueue, Item, answer_all
from jaxtta.deploy.review import Review
from jaxtta.deploy.rollout import Plan, chosen
from jaxtta.deploy.session import Session
from jaxtta.deploy.sources import PATIENCE, Watcher, paths_on_stdin
from jaxtta.deploy.staged import Staged

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
    """Make a session of an adapter's name; those of one name share the compiled step."""
    model, params, task, parsed = made
    steps = {}

    def make(name, fresh=False, **more):
        spec = parsed[name]
        adapter = adapters.make_adapter(spec, model, task, adapters.AdapterConfig())
        more = {
            "batch_size": 4,
            "full_size": spec.needs_originals,
            "settings": {"adapter": name},
        } | more
        session = Session(model, params, task, adapter, **more)
        if not fresh:
            session._step = steps.setdefault(name, session._step)
        return session

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
    assert answer.decision in DECISIONS and 0 < answer.share <= 1 and answer.guarded
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
    session = new("guarded:tent:lr=0.01", fresh=True, digests=True)
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


def items(names, due=0.0):
    image = Image.new("RGB", (2, 2))
    return [Item(name, image, due=due) for name in names]


class Echo:
    """A session that answers by the image's name alone."""

    def answer(self, images, names, reply):
        assert len(images) == len(names) <= 4
        given = [Answer(name, np.eye(2)[0], None, None, 0, 0, None, None, False) for name in names]
        reply(given)
        return given


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(9, 20))
def test_a_queue_keeps_the_order_and_fills_batches(bunches, limit):
    queue, out, sizes, number = BatchQueue(4, limit, 1), [], [], 0
    for bunch in bunches:  # with sessions between, so that there is room
        before = len(queue)
        names = range(number, number + bunch)
        if queue.offer(items(names, due=float("inf"))):
            number += bunch
            assert len(queue) == before + bunch
        else:
            assert before + bunch > limit and len(queue) == before
            while len(queue) >= 4:
                taken = queue.take()
                sizes.append(len(taken))
                out += [x.name for x in taken]
    queue.finish()
    answer_all(queue, Echo(), lambda items, answers: out.extend(x.name for x in answers))
    assert out == [*range(number)]
    assert set(sizes) <= {4}


def test_a_batch_that_is_not_full_goes_when_it_is_due():
    queue = BatchQueue(4, 8, 2)
    queue.offer(items("ab", due=time.monotonic() + 0.05))
    queue.offer(items("c", due=float("inf")))
    assert [x.name for x in queue.take()] == ["a", "b", "c"]  # no one waits longer than he must
    queue.offer(items("d", due=float("inf")))
    queue.finish()  # of a source that has no more: what waits is due
    assert [x.name for x in queue.take()] == ["d"]
    queue.finish(FileNotFoundError("the folder is gone"))
    with pytest.raises(FileNotFoundError, match="the folder is gone"):
        answer_all(queue, Echo())


def test_a_queue_that_ends_tells_those_that_wait():
    queue, replies = BatchQueue(4, 8, 1), []
    queue.offer([x._replace(reply=replies.append) for x in items("abc", due=float("inf"))])
    full = threading.Thread(target=lambda: [queue.put(x) for x in items("defghijklm")])
    full.start()  # waits for room
    queue.stopping = True
    answer_all(queue, Echo())
    full.join()
    assert replies == [None] * 3
    assert not queue.offer(items("n")) and len(queue) == 0

    class Failing:
        def answer(self, images, names, reply):
            raise RuntimeError("the device is gone")

    queue = BatchQueue(2, 8, 1)
    queue.offer([x._replace(reply=replies.append) for x in items("abc")])
    with pytest.raises(RuntimeError, match="the device is gone"):
        answer_all(queue, Failing())
    assert replies == [None] * 6


def test_answers_go_out_before_their_record(new):
    """A log that fails or is slow takes no answer away."""
    session, told = new("zero_shot", digests=True), []

    class Full:
        def write(self, record):
            assert told == ["a", "b"]
            raise ValueError("the log is closed")

    session.log, queue = Full(), BatchQueue(4, 8, 1)
    image = session.prepare(IMAGES[0])
    reply = lambda answer: told.append(answer and answer.name)  # noqa: E731
    queue.offer([Item(name, image, reply, due=0) for name in "ab"])
    with pytest.raises(ValueError, match="the log is closed"):
        answer_all(queue, session)
    assert told == ["a", "b"]


def test_a_short_queue_still_fills_batches():
    """A file that is put waits for a full batch; a limit below its size must not hold others."""
    queue, out = BatchQueue(4, 1, 1), []

    def put():
        for item in items("abcdef", due=float("inf")):
            queue.put(item)
        queue.finish()

    threading.Thread(target=put, daemon=True).start()
    stop = threading.Timer(20, queue.close)
    stop.start()
    answer_all(queue, Echo(), lambda items, answers: out.append("".join(x.name for x in answers)))
    stop.cancel()
    assert out == ["abcd", "ef"]


def test_a_watched_folder_gives_each_file_once(tmp_path):
    clock, names = [0.0], lambda paths: [path.name for path in paths]
    for name in ("b.png", "a.png", "old.png", "note.txt"):
        (tmp_path / name).write_bytes(b"x")
    watcher = Watcher(tmp_path, {str(tmp_path / "old.png")}, now=lambda: clock[0])
    first = watcher.poll()
    assert sorted(names(first)) == ["a.png", "b.png"]
    watcher.done(first[0])
    assert watcher.poll() == first[1:]
    # half-written: tried again, and broken only once it has not changed for a while
    half = first[1]
    assert not watcher.failed(half)
    clock[0] += PATIENCE - 1
    assert watcher.poll() == [half]
    half.write_bytes(b"longer")
    assert not watcher.failed(half)
    clock[0] += PATIENCE - 1
    assert not watcher.failed(half)
    clock[0] += 2
    assert (watcher.failed(half), watcher.poll()) == (True, [])
    half.write_bytes(b"whole at last")
    assert watcher.poll() == [half]
    watcher.done(half)
    (tmp_path / "below").mkdir()
    half.rename(tmp_path / "below" / "moved.png")
    (found,) = watcher.poll()
    assert found == tmp_path / "below" / "moved.png"
    found.unlink()
    assert not watcher.failed(found)
    assert watcher.poll() == []


def answer_of(name, reference, adapted, score=0.9):
    scores = lambda n: np.where(np.arange(3) == n, score, (1 - score) / 2)  # noqa: E731
    both = scores(reference), scores(adapted)
    return Answer(name, both[0], *both, 7, 1, "adapt", 0.5, True)


def test_images_for_review_are_copied_and_their_labels_read(tmp_path, caplog):
    folder, classes = tmp_path / "review", ("cat", "dog", "ship")
    source = tmp_path / "a b.png"
    source.write_bytes(b"pixels")
    review = Review(folder, classes, below=0.5, limit=12)
    item = Item(source, None, original=source)
    assert not review.offer(item, answer_of("sure", 0, 0))
    assert review.offer(item, answer_of("unsure", 1, 1, score=0.4))
    upload = Item("http:12ab/../../etc/x.jpg", None, original=b"bytes")
    assert review.offer(upload, answer_of("both", 0, 1))
    (folder / "review.jsonl").open("a").write('{"file": "torn')
    review = Review(folder, classes, below=0.5, limit=12)  # as after a crash
    for _ in range(20):
        review.offer(upload, answer_of("both", 0, 1))
    lines = (folder / "review.jsonl").read_text().split("\n")
    records = [json.loads(line) for line in lines if line[-1:] == "}"]
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg"))
    assert sorted(x["file"] for x in records) == files
    assert (len(files), files[0], files[1]) == (12, "000000-a_b.png", "000001-x.jpg")
    assert ((folder / files[0]).read_bytes(), (folder / files[1]).read_bytes()) == (
        b"pixels",
        b"bytes",
    )
    assert (records[0]["why"], records[1]["why"]) == ("unsure", "disagree")
    assert (records[1]["frozen_label"], records[1]["adapted_label"]) == ("cat", "dog")
    # the frozen model is right on all images on which they disagree
    rows = ["file,label", f"{files[0]},ship", "gone.png,cat", f"{files[1]},horse"]
    (folder / "labels.csv").write_text("\n".join([*rows, f"{files[1]},cat"]))
    assert not review.adapted_is_worse()
    assert caplog.text.count("the file or the class is unknown") == 2
    assert tuple(map(int, review.pairs)) == (0, 0, 1)
    (folder / "labels.csv").write_text("\n".join(["file,label", *(f"{x},cat" for x in files)]))
    assert review.adapted_is_worse()
    (folder / "labels.csv").write_text("file,label\n")
    assert review.adapted_is_worse()  # what was shown stays


def test_a_review_folder_that_cannot_be_written_stops_nothing(tmp_path, caplog, monkeypatch):
    review = Review(tmp_path / "review", ("cat", "dog", "ship"), below=0.5, limit=12)
    gone = Item("a.png", None, original=tmp_path / "gone.png")
    for _ in range(2):
        assert not review.offer(gone, answer_of("both", 0, 1))
    assert (review.lost, caplog.text.count("images for review are lost")) == (2, 1)
    # A disk that is full in the middle of a line leaves nothing that another run cannot read.
    item, real, sizes = Item("b.png", None, original=b"x"), os.write, iter([3])

    def full(file, content):
        if (size := next(sizes, None)) is None:
            raise OSError(28, "No space left on device")
        return real(file, content[:size])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert not review.offer(item, answer_of("both", 0, 1))
    assert [path.name for path in (tmp_path / "review").iterdir()] == ["review.jsonl"]
    assert review.offer(item, answer_of("both", 0, 1))
    (line,) = (tmp_path / "review" / "review.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "000000-b.png"
    Review(tmp_path / "review", ("cat", "dog", "ship"), below=0.5, limit=12)


@pytest.mark.parametrize("broken", ["reference", "adapted"])
def test_models_without_finite_answers_do_not_disagree(broken):
    answer = answer_of("both", 1, 2)
    assert answer.disagree
    assert not answer._replace(**{broken: np.full(3, np.nan)}).disagree


def test_a_file_of_answers_is_continued(tmp_path, monkeypatch, caplog):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"file": "a.png"}\n{"file": "b.p')  # as after kill -9
    answers = AnswersFile(path, "")
    assert answers.names() == {"a.png"}
    answers.write('{"file": "c.png"}\n')
    real, short = os.write, iter([3, OSError(28, "No space left on device")])

    def full(file, content):
        step = next(short)
        if isinstance(step, OSError):
            raise step
        return real(file, content[:step])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        answers.write('{"file": "d.png"}\n')
    answers.write('{"file": "e.png"}\n')
    answers.close()
    assert path.read_text() == '{"file": "a.png"}\n{"file": "c.png"}\n{"file": "e.png"}\n'
    assert (answers.lost, caplog.text.count("No space left on device")) == (1, 1)
    table = tmp_path / "answers.csv"
    AnswersFile(table, "file,label\n").write('"x\ny.png",cat\n')
    assert AnswersFile(table, "file,label\n").names() == {"x\ny.png"}
    with pytest.raises(
        ValueError, match=r"answers.csv: begins with 'file,label', expected the col"
    ):
        AnswersFile(table, "file,label,score\n")
    path.write_text("cat\n")
    with pytest.raises(ValueError, match=r"answers.jsonl: line 1 is no answer"):
        AnswersFile(path, "").names()
    with pytest.raises(ValueError, match="/dev/null: is no ordinary file"):
        AnswersFile("/dev/null", "")


def test_paths_come_on_stdin(monkeypatch):
    """In pieces, with odd names, the last without its line break; it ends when the queue stops."""
    queue, (out, into) = BatchQueue(4, 8, 1), os.pipe()
    with os.fdopen(out) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        paths = paths_on_stdin(queue)
        os.write(into, b"a b.png\r\n\ncaf\xe9.png\nlas")
        assert [os.fsencode(next(paths)) for _ in range(2)] == [b"a b.png", b"caf\xe9.png"]
        os.write(into, b"t.png")
        os.close(into)
        assert [str(path) for path in paths] == ["last.png"]
        queue.stopping = True
        assert [*paths_on_stdin(queue)] == []


def test_a_staged_session_answers_more_images_and_returns(new, tmp_path):
    plan = Plan(shares=(0.25, 1.0), calm_images=8, share_without_labels=1.0)
    session, file = new("guarded:tent:lr=0.01"), tmp_path / "stage.json"
    staged = Staged(session, plan, file)
    first = session.answer(IMAGES[:4], [f"{n}.png" for n in range(4)])
    assert [x.guarded for x in first] == [chosen(x.name, 0.25) for x in first]
    calm = [x._replace(decision="adapt") for x in first]
    said = [staged.after(calm, None) for _ in range(2)]
    assert said == [None, "the guarded model answers 100% of the images"]
    staged.save()
    again = Staged(session, plan, file)
    assert all(x.guarded for x in run(session, IMAGES[:8]))
    news = again.after([calm[0]._replace(decision="stop")], None)
    assert news == "the guarded model answers 0% of the images: the guard stopped adapting"
    assert not any(x.guarded for x in run(session, IMAGES[:4]))
    for content in ('{"stage": 7}', '{"stage": -1}', '{"stage": 0.5}', '{"place": 0}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"stage.json: holds no stage of this roll-out"):
            Staged(session, plan, file)


def test_a_start_heeds_old_labels_and_a_full_disk_ends_nothing(tmp_path, capsys, monkeypatch):
    folder, session = tmp_path / "review", SimpleNamespace(class_names=("cat", "dog"), served=None)
    folder.mkdir()
    said = {"why": "disagree", "frozen_label": "cat", "adapted_label": "dog"}
    lines = [json.dumps({"file": f"{n}.png"} | said) + "\n" for n in range(20)]
    (folder / "review.jsonl").write_text("".join(lines))
    (folder / "labels.csv").write_text(
        "file,label\n" + "".join(f"{n}.png,cat\n" for n in range(20))
    )
    options = serve.Options(review=folder, state=tmp_path / "state", share=0.5)
    served = serve.Served(options, session, 0)
    assert not any(session.served(f"{n}.png") for n in range(50))
    assert "the frozen one answers" in capsys.readouterr().err
    with Path("/dev/full").open("w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        for _ in range(2):
            served._print("a.png  cat\n")
        with contextlib.suppress(OSError):
            full.close()
    assert served.lost == 2
    assert capsys.readouterr().err.count("stdout: No space left on device; answers are lost") == 1
    served.save()
    assert not (tmp_path / "state").exists()
