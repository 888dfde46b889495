"""The audit log: what is written is read, whatever happens to the process and the disk."""

import json
import resource
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtta.adapters import Prediction
from jaxtta.adapters.base import Answers
from jaxtta.deploy.audit import AuditLog, as_log_record, read_log, record_of, steps_of

HEADER = {"model": "clip", "class_names": ["cat", "NaN"]}
NUMBERS = st.floats(width=32)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=9)  # lone surrogates among them


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
    metrics = {"share": np.float32(0.1), "decision": np.int32(3), "reason": np.int32(4)}
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


@pytest.mark.parametrize("room", [0, 1, 30, 79, 80])
def test_a_full_disk_loses_records_and_the_log_says_which(tmp_path, file_size, room):
    path = tmp_path / "log.jsonl"
    log = AuditLog(path, HEADER, now=lambda: 0)
    log.write({"step": 0})
    drain(log)
    size = len(path.read_bytes())
    file_size(size + room)  # a record has 27 bytes
    for step in range(1, 5):
        log.write({"step": step})
    drain(log)
    file_size(resource.RLIM_INFINITY)
    kept = room // 26
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
