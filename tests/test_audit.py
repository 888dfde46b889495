"""The audit log: what is written is read, whatever happens to the process and the disk."""

import collections
import dataclasses
import json
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxtta.adapters import Prediction
from jaxtta.adapters.base import Answers
from jaxtta.adapters.guard import DECISIONS, REASONS, Policy
from jaxtta.deploy.audit import AuditLog, as_log_record, read_log, record_of, steps_of
from jaxtta.deploy.bundle import save_bundle
from jaxtta.deploy.replay import _difference, replay
from jaxtta.deploy.setup import Setup, header_of, policy_of

HEADER = {"model": "clip", "class_names": ["cat", "NaN"]}
NUMBERS = st.floats(width=32)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=9)  # lone surrogates among them
TEXTS |= st.sampled_from(["caf\udce9", "\ufffd", "\ufffddce9", "NaN"])


def write(path, records, header=HEADER):
    with AuditLog(path, header, now=lambda: 0) as log:
        for record in records:
            log.write(record)
    return log


def same(first, second):
    """Equality that holds for NaN."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


@st.composite
def records(draw):
    """What steps of one to three images with any names and numbers are recorded as."""
    count = draw(st.integers(1, 3))
    names = draw(st.lists(TEXTS, min_size=count, max_size=count))
    logits = np.array(draw(st.lists(st.lists(NUMBERS, min_size=2, max_size=2), min_size=4)), "f4")
    logits = np.resize(logits, (4, 2))
    metrics = {"loss": np.float32(draw(NUMBERS)), "skipped": np.bool_(draw(st.booleans()))}
    pixels = np.zeros((count, 2, 2, 3), np.uint8)
    prediction = Prediction(logits, metrics)
    return record_of(prediction, 0, names, pixels, ["cat", "NaN"], "00", draw(st.integers(0, 9)))


@given(st.lists(records(), max_size=3), st.dictionaries(TEXTS, TEXTS, max_size=2))
def test_any_names_and_numbers_are_read_as_they_were_written(tmp_path_factory, given, header):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    write(path, given, {"settings": header})
    first, events = read_log(path)
    assert first["settings"] == header
    assert same(events, [{"event": "step", **record} for record in given])

    def refuse(text):
        raise AssertionError(text)

    for line in path.read_bytes().splitlines():
        json.loads(line.decode("utf-8"), parse_constant=refuse)
        assert "\\ud" not in line.decode()


@given(st.data())
def test_a_log_torn_at_any_byte_has_all_earlier_records_and_goes_on(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    write(path, [{"step": n, "images": ["é\ud800\n"]} for n in range(3)])
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    complete = max(whole[:cut].count(b"\n") - 1, 0)
    if b"\n" in whole[:cut]:
        assert [s["step"] for s in steps_of(read_log(path)[1])][:complete] == [*range(complete)]
    write(path, [{"step": 7}])
    header, events = read_log(path)
    steps = [event["step"] for event in steps_of(events)]
    assert header["model"] == "clip"
    assert steps[:complete] == [*range(complete)]
    assert steps[-1] == 7
    assert len(steps) <= complete + 2  # the cut may have been before the last line's end


def test_a_record_says_what_both_models_answer():
    both = Answers(np.log([[0.75, 0.25]] * 4), np.log([[0.5, 0.5]] * 3 + [[np.nan, 1]]))
    decision, reason = DECISIONS.index("roll_back"), np.int32(REASONS.index("narrowing"))
    metrics = {"share": np.float32(0.1), "decision": np.int32(decision), "reason": reason}
    prediction = Prediction(both.reference, {**metrics, "strikes": np.int32(2)}, None, both)
    images = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    record = record_of(prediction, 5, "abcd", images, ["cat", "dog"], "0f", 1.5)
    assert record["time"] == "1970-01-01T00:00:01.500000+00:00"
    assert (record["decision"], record["reason"]) == ("roll_back", "narrowing")
    assert (record["share"], record["signals"]) == (0.1, {"strikes": 2})
    assert [x["label"] for x in record["adapted"]] == ["cat"] * 3 + [None]
    np.testing.assert_allclose([x["probability"] for x in record["reference"]], 0.75)
    assert len({*record["digests"]}) == 4
    padded = record_of(prediction, 5, "ab", images[:2], ["cat", "dog"], "0f", 1.5)
    for name in ("images", "digests", "served", "reference", "adapted"):
        assert padded[name] == record[name][:2]
    unguarded = record_of(Prediction(both.reference, {}), 5, "abcd", images, "ab", "0f", 1.5)
    assert unguarded["decision"] is unguarded["adapted"] is unguarded["share"] is None


def test_lines_are_records_of_opentelemetry(tmp_path):
    write(
        tmp_path / "log", [{"step": 0, "time": "2026-11-27T22:00:00.000001+00:00", "served": [1]}]
    )
    header, (step,) = read_log(tmp_path / "log")
    assert as_log_record(header)["EventName"] == "jaxtta.start"
    record = as_log_record({**step, "decision": "stop"})
    assert record == {
        "Timestamp": 1795816800000001000,
        "SeverityText": "ERROR",
        "SeverityNumber": 17,
        "EventName": "jaxtta.step",
        "Body": [1],
        "Attributes": {"jaxtta.step": 0, "jaxtta.decision": "stop"},
    }


@pytest.fixture
def file_size():
    """Set the largest size that a file may get, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 25, 30, 80])
def test_a_full_disk_loses_records_and_the_log_says_which(tmp_path, file_size, room):
    path = tmp_path / "log.jsonl"
    log = AuditLog(path, HEADER, now=lambda: 0)
    log.write({"step": 0})
    drain(log)
    size = len(path.read_bytes())
    file_size(size + room)  # a record has 26 bytes, and is whole without its line feed
    for step in range(1, 5):
        log.write({"step": step})
    drain(log)
    file_size(resource.RLIM_INFINITY)
    kept = (room + 1) // 26
    assert log.lost == 4 - kept
    log.write({"step": 5})
    log.close()
    events = read_log(path)[1]
    assert [s["step"] for s in steps_of(events)] == [*range(kept + 1), 5]
    (lost,) = [event for event in events if event["event"] == "lost"]
    assert (lost["count"], lost["first_step"], lost["last_step"]) == (4 - kept, kept + 1, 4)
    assert "too large" in lost["why"]


def drain(log):
    with log._changed:
        assert log._changed.wait_for(lambda: not log._waiting, 10)


def test_a_slow_disk_delays_no_answer_and_loses_what_does_not_fit(tmp_path):
    path = tmp_path / "log.jsonl"
    log = AuditLog(path, HEADER, limit=2)
    go, file = threading.Event(), log._file

    class Slow:
        def write(self, content):
            assert go.wait(10)
            return file.write(content)

        def close(self):
            file.close()

    log._file = Slow()
    for step in range(7):
        log.write({"step": step})  # or this would wait for ever
    assert log.lost == 5
    go.set()
    log.close()
    events = read_log(path)[1]
    assert [s["step"] for s in steps_of(events)] == [0, 1]
    (lost,) = [event for event in events if event["event"] == "lost"]
    assert (lost["first_step"], lost["last_step"], lost["why"]) == (2, 6, "the disk is too slow")


def test_what_was_lost_last_is_said_at_the_end_or_warned_of(tmp_path, file_size, caplog):
    path = tmp_path / "log.jsonl"
    log = AuditLog(path, HEADER)
    file_size(path.stat().st_size)
    log.write({"step": 0})
    log.write({"step": 1})
    log.close()
    file_size(resource.RLIM_INFINITY)
    assert f"{path}: 2 records are lost" in caplog.messages
    assert caplog.messages[0].startswith(f"{path}: File too large; records are lost")


def test_other_files_and_logs_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "log.jsonl"
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_log(path)
    for content in (b"{}\n", b"\x89PNG", b"[1]\n", b"x" * 5000):
        path.write_bytes(content)
        for use in (read_log, lambda path: AuditLog(path, HEADER)):
            with pytest.raises(ValueError, match="is no log of jaxtta"):
                use(path)
        assert path.read_bytes() == content
    path.write_bytes(b'{"event":"start","format":2,"other":1}\n')
    for use in (read_log, lambda path: AuditLog(path, HEADER)):
        with pytest.raises(ValueError, match="of format 2, this version of jaxtta has 1"):
            use(path)
    path.unlink()
    log = write(path, [{"step": 0}, {"step": 1}])
    with pytest.raises(ValueError, match="is closed"):
        log.write({"step": 2})
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][3:], *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 is not a record, the log was changed"):
        read_log(path)
    with pytest.raises(TypeError), AuditLog(path, HEADER) as log:
        log.write({"step": object()})
    with AuditLog(path, HEADER), pytest.raises(ValueError, match="another process writes"):
        AuditLog(path, HEADER)


KILLED = """
import os, random, signal, sys, time
from jaxtta.deploy import audit
from jaxtta.deploy.audit import AuditLog
path, answers = sys.argv[1:]
audit._PATIENCE = 60  # a busy machine may keep the writing thread waiting, as a slow disk does
draw = random.Random(0)
for round in range(30):
    if (child := os.fork()) == 0:
        log = AuditLog(path, {"model": "clip"})
        with open(answers, "ab", buffering=0) as file:
            for step in range(10**9):
                log.write({"step": step, "images": ["x" * (step % 997)] * 9})
                file.write(f"{round} {step}\\n".encode())
    time.sleep(draw.random() / 10)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_killed_process_loses_at_most_the_last_record(tmp_path):
    path, answers = tmp_path / "log.jsonl", tmp_path / "answers"
    subprocess.run([sys.executable, "-c", KILLED, path, answers], check=True)
    answered = collections.Counter(line.split()[0] for line in answers.open())
    header, events = read_log(path)
    rounds = []
    for event in (header, *events):
        rounds += [[]] if event["event"] == "start" else []
        rounds[-1] += [event["step"]] if event["event"] == "step" else []
    # Those that were killed before they answered anything count for nothing.
    counts = [len(steps) for steps in rounds if steps]
    assert rounds == [[*range(len(steps))] for steps in rounds]
    assert len(counts) > 10
    assert len(answered) <= len(counts)
    assert sum(counts) >= sum(answered.values()) - len(answered)
    if len(answered) == len(counts):
        pairs = zip(counts, answered.values(), strict=True)
        assert all(written >= told - 1 for written, told in pairs)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of small images with names of all kinds."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in (*map(str, range(10)), "é", "caf\udce9", "a b", "\n"):
        pixels = draw.integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def logged(path, setup, images, sizes, session=None, seed=0):
    """Run a session over random images, with a log."""
    session = session or setup.session(*setup.load())
    names, draw = sorted(x.name for x in images.iterdir()), np.random.default_rng(seed)
    with AuditLog(path, header_of(session, setup)) as session.log:
        for size in sizes:
            chosen = [names[n] for n in draw.integers(0, len(names), size)]
            session.answer([np.asarray(Image.open(images / name)) for name in chosen], chosen)
    return session


@pytest.fixture(scope="module")
def run(short, images, tmp_path_factory):
    """A log of a run without adaptation, and its setup."""
    path = tmp_path_factory.mktemp("run") / "log.jsonl"
    setup = Setup("zero_shot", ("cat", "dog", "bird"), model=str(short), batch_size=3)
    logged(path, setup, images, (3, 3, 1, 2))
    return path, setup


def edited(path, folder, change):
    """A copy of a log whose lines were changed, each a dict."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(lines)
    text = [json.dumps(line, separators=(",", ":")) for line in lines]
    (folder / "log.jsonl").write_text("\n".join([*text, ""]))
    return folder / "log.jsonl"


def test_a_run_is_repeated_or_the_first_difference_named(run, images, tmp_path, run_jaxtta):
    path, _ = run
    code, out, _ = run_jaxtta("replay", path, "--images", images)
    assert (code, out) == (0, "4 steps with 9 images are the same, bit for bit\n")

    def changed(lines):
        lines[0]["versions"].update(jax="0.1")
        lines[3].update(state_digest="ff")

    code, out, _ = run_jaxtta("replay", edited(path, tmp_path, changed), "--images", images)
    assert code == 1
    assert out.startswith(
        "2 steps with 6 images are the same, bit for bit\ndiffers at step 2: state_d"
    )
    assert ", the log has ff (the log was written with jax 0.1, here 0." in out
    found = replay(edited(path, tmp_path, lambda lines: lines.pop(3)), folder=images)
    assert (found.steps, found.step, found.field) == (2, 3, "step")
    assert found.difference == "step 3: the log lacks those from 2 on, which led to it"


def test_differences_are_told_by_field():
    cat, dog = ({"label": name, "probability": 0.5} for name in ("cat", "dog"))
    nan = {"label": None, "probability": float("nan")}

    def told(field, logged, own):
        return _difference(logged, own, ["a", "b\n"], field)

    assert told("served", [cat, nan], [cat, {**nan}]) is None
    expected = r"the served answer for b\n is dog (0.5), the log has cat (0.5)"
    assert told("served", [cat, cat], [cat, dog]) == expected
    assert told("adapted", None, [cat, cat]).endswith(", the log has None")
    assert told("decision", "skip", "adapt") == "decision is adapt, the log has skip"
    assert told("signals", {"a": 1, "b": 2}, {"a": 1, "b": 3}) == "signals.b is 3, the log has 2"
    assert told("signals", {"a": 1}, {}) == "signals.a is None, the log has 1"


def test_changed_images_models_and_settings_are_named(run, images, tmp_path):
    path, _ = run
    name = read_log(path)[1][1]["images"][2]

    def read(file):
        image = Image.open(file)
        if file.name == name:
            image.putpixel((31, 31), tuple(255 - x for x in image.getpixel((31, 31))))
        return image

    found = replay(path, folder=images, read=read)
    assert found.field == "digests"
    assert found.difference.endswith(" has other pixels than when it was logged")
    found = replay(path, folder=images, adapter="tent:lr=1e-2")
    assert (found.steps, found.step) == (0, 0)
    assert found.difference.startswith("step 0: ")

    def header(change):
        return edited(path, tmp_path, lambda lines: change(lines[0]))

    for part, what in (("weights", "weights"), ("settings", "architecture or preprocessing")):
        log = header(lambda x, part=part: x["model"].update({part: "0"}))
        with pytest.raises(ValueError, match=rf"clip: has other {what} than the log's model"):
            replay(log)
    with pytest.raises(ValueError, match=r"no settings of a session: batch_size is '3'"):
        replay(header(lambda x: x["setup"].update(batch_size="3")))
    log = header(lambda x: x.update(state_digest="00"))
    assert replay(log).difference.endswith(", the log has 00")
    log = header(lambda x: x.update(state_digest="00", steps=7))
    with pytest.raises(ValueError, match=r"goes on at step 7 from a state .*, give it with --stat"):
        replay(log)
    with pytest.raises(ValueError, match=r"log.jsonl: compute_dtype is 'odd', expected float32"):
        replay(header(lambda x: x["setup"].update(compute_dtype="odd")))
    for odd in ({"guarded": [True]}, {"guarded": 5}, {"digests": []}):
        log = edited(path, tmp_path, lambda lines, odd=odd: lines[1].update(odd))
        assert replay(log, folder=images).field in odd
    with pytest.raises(ValueError, match=r"a lost has no count"):
        replay(edited(path, tmp_path, lambda lines: lines.append({"event": "lost"})))
    with pytest.raises(ValueError, match=r"a start has no setup, it cannot be repeated"):
        replay(header(lambda x: x.pop("setup")))
    found = replay(path, folder=tmp_path)
    assert (found.step, found.field) == (0, "images")
    assert "cannot be decoded" in found.difference


def test_a_run_that_began_with_a_bundle_is_repeated(run, images, tmp_path):
    _, setup = run
    session = setup.session(*setup.load())
    logged(tmp_path / "before.jsonl", setup, images, (3,), session)
    state = save_bundle(tmp_path, session, setup) / "state.safetensors"
    path = tmp_path / "log.jsonl"
    logged(path, setup, images, (3, 2), session)
    assert replay(path, folder=images, state=state)[:4] == (2, 5, 0, None)


def test_a_header_has_all_numbers_of_the_policy(run):
    path, setup = run
    header, _ = read_log(path)
    assert header["policy"] is None
    guarded = dataclasses.replace(setup, adapter="guarded:zero_shot", policy={"strikes": 5})
    assert policy_of(guarded.policy) == Policy(strikes=5)
    with pytest.raises(ValueError, match="a guard's policy has no number odd"):
        dataclasses.replace(guarded, policy={"odd": 1})
    with pytest.raises(ValueError, match="share is 'x', expected 0 to 1"):
        dataclasses.replace(guarded, policy={"share": "x"})


@pytest.mark.slow
def test_a_roll_out_is_repeated(short, images, tmp_path):
    path = tmp_path / "log.jsonl"
    setup = Setup("guarded:zero_shot", ("cat", "dog", "bird"), model=str(short), batch_size=3)
    session = setup.session(*setup.load(), served=lambda name: name < "5")
    logged(path, setup, images, (3, 3), session)
    assert read_log(path)[0]["policy"] == dataclasses.asdict(Policy())
    chosen = [x for step in steps_of(read_log(path)[1]) for x in step["guarded"]]
    assert {*chosen} == {True, False}
    assert replay(path, folder=images)[:4] == (2, 6, 0, None)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["guarded:batclip:lr=1e-2", "tent:lr=1e-2", "tda"])
def test_a_log_of_500_steps_is_repeated_bit_for_bit(adapter, short, images, tmp_path):
    """With a process in between that goes on from an earlier state than the log's last."""
    path, state = tmp_path / "log.jsonl", tmp_path / "state.safetensors"
    setup = Setup(adapter, ("cat", "dog", "bird"), model=str(short), batch_size=4, seed=3)
    sizes = [4, 4, 3, 1, 4] * 50
    session = logged(path, setup, images, sizes[:240])
    session.save(state)
    logged(path, setup, images, sizes[240:], session, seed=1)
    after = setup.session(session.model, session.params)
    after.load(state)
    logged(path, setup, images, sizes, after, seed=2)
    found = replay(path, folder=images)
    assert found.difference is None
    assert (found.steps, found.images) == (500, 2 * sum(sizes))
    other = replay(path, folder=images, adapter=adapter.replace("lr=1e-2", "lr=1.0001e-2"))
    assert (other.difference is None) == (adapter == "tda")
    if "lr" in adapter:
        assert other.step == 0
    alone = tmp_path / "alone.jsonl"
    second = dataclasses.replace(setup)
    after.load(state)
    logged(alone, second, images, sizes[:5], after)
    with pytest.raises(ValueError, match=r"goes on at step 240 .*, give it with --state"):
        replay(alone, folder=images)
    assert replay(alone, folder=images, state=state)[:4] == (5, sum(sizes[:5]), 0, None)
    if "lr" in adapter:
        other = adapter.replace("lr=1e-2", "lr=1.0001e-2")
        assert replay(alone, folder=images, state=state, adapter=other).step == 240
