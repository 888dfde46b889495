"""Results in a bucket: what is uploaded, who may write, and what goes wrong."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from conftest import errors_in
from fsspec.implementations.memory import MemoryFileSystem
from test_sweep import same, sweep

from jaxtta import cli, remote
from jaxtta.cli import continual
from jaxtta.remote import mirror

URL = "memory://bucket/runs"
MARKER = "/bucket/runs/.running-"
TEST = ("--corruptions", "fog", "clean", "--max-images", "20", "--batch-size", "10")
SWEEP = ("sweep", *TEST, "--adapters", "zero_shot", "tent", "--workers", "0", "--output")


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An empty bucket: its content by name; uploads are frequent, local copies in a new folder."""
    monkeypatch.setattr(remote, "EVERY", 0.02)
    (tmp_path / "local").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return MemoryFileSystem.store


@pytest.fixture
def copies(store, tmp_path):
    """A function that lists the local copies that exist."""
    return lambda: [*(tmp_path / "local").iterdir()]


def names(store):
    """The files of the folder, without markers."""
    found = [name for name in [*store] if not name.startswith(MARKER)]  # a thread writes, too
    return sorted(name.removeprefix("/bucket/runs/") for name in found)


def write(folder, name, text="text"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def wait_until(true):
    """Wait for the thread that uploads."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def mark(store, part, host="elsewhere", age=0.0, process=1):
    """Leave the marker of another process."""
    found = {"id": "other", "host": host, "process": process, "since": "12:00"}
    found["time"] = time.time() - age
    fsspec.filesystem("memory").pipe_file(MARKER + part, json.dumps(found).encode())


def failing(error):
    """A method of a file system that raises."""

    def method(*args, **kwargs):
        raise error

    return method


@pytest.mark.parametrize("path", ["runs/a", Path("/runs/a"), "file:///runs/a", Path("file:///a")])
def test_a_local_folder_is_given_as_it_is(store, copies, path):
    with mirror(path) as folder:
        assert folder == Path(str(path).replace("file:/", "/").replace("///", "/"))
    assert not copies() and not store


@pytest.mark.parametrize("kind", [str, Path])
def test_files_are_uploaded_during_the_run_and_found_by_the_next(store, copies, kind):
    with mirror(kind(URL)) as folder:
        assert folder.name == "runs" and not folder.exists()
        write(folder, ".lock-0-of-1"), write(folder, "a/.hidden/b"), write(folder, "a/.b.123")
        write(folder, "settings.json"), write(folder, "a/b=1%2F3 ü.txt", "one")
        wait_until(lambda: names(store) == ["a/b=1%2F3 ü.txt", "settings.json"])
        write(folder, "a/b=1%2F3 ü.txt", "other")
        wait_until(lambda: store["/bucket/runs/a/b=1%2F3 ü.txt"].getvalue() == b"other")
        write(folder, "late")
    assert names(store) == ["a/b=1%2F3 ü.txt", "late", "settings.json"]
    assert not copies()
    with mirror(kind(URL)) as folder:
        assert (folder / "a/b=1%2F3 ü.txt").read_text() == "other"
        assert not [*folder.rglob(".*")]


def test_what_is_unchanged_is_not_uploaded_again(store, monkeypatch):
    with mirror(URL) as folder:
        write(folder, "a"), write(folder, "b")
    sent, put = [], MemoryFileSystem.put_file
    monkeypatch.setattr(
        MemoryFileSystem, "put_file", lambda *args: (sent.append(args[2]), put(*args))
    )
    with mirror(URL) as folder:
        write(folder, "b", "longer")
    assert sent == ["/bucket/runs/b"]


def test_removed_checkpoints_vanish_and_nothing_else_does(store):
    with mirror(URL, "0-of-2") as folder:
        write(folder, "checkpoints/fog/step-1"), write(folder, "checkpoints/haze/step-1")
        write(folder, "predictions/fog")
    with mirror(URL, "1-of-2") as other, mirror(URL, "0-of-2") as folder:
        write(folder, "checkpoints/fog/step-2")
        (folder / "checkpoints/fog/step-1").unlink()
        (folder / "predictions/fog").unlink()  # as a system that clears its temporary files
        kept = ["checkpoints/fog/step-2", "checkpoints/haze/step-1", "predictions/fog"]
        wait_until(lambda: names(store) == kept)
        write(other, "checkpoints/snow/step-1")
    assert names(store) == [*kept[:2], "checkpoints/snow/step-1", kept[2]]


def test_a_checkpoint_is_removed_after_the_next_is_uploaded(store, monkeypatch):
    with mirror(URL) as folder:
        write(folder, "checkpoints/step-1")
    done, put, remove = [], MemoryFileSystem.put_file, MemoryFileSystem.rm_file

    def slow_put(self, source, target):
        done.append(("put", target.rpartition("/")[2]))
        put(self, source, target)
        if target.endswith("settings.json"):  # meanwhile the run has written another checkpoint
            (folder / "checkpoints/step-2").rename(folder / "checkpoints/step-3")

    def noted_remove(self, path):
        done.append(("remove", path.rpartition("/")[2]))
        remove(self, path)

    monkeypatch.setattr(remote, "EVERY", 1000)
    monkeypatch.setattr(MemoryFileSystem, "put_file", slow_put)
    monkeypatch.setattr(MemoryFileSystem, "rm_file", noted_remove)
    with mirror(URL, None) as folder:
        os.utime(write(folder, "settings.json"), (1, 1))
        (folder / "checkpoints/step-1").rename(folder / "checkpoints/step-2")
        os.utime(folder / "checkpoints/step-2", (2, 2))
    assert done == [("put", "settings.json"), ("put", "step-3"), ("remove", "step-1")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_is_uploaded_too(store, copies, error):
    with pytest.raises(error, match=f"^{URL}/x is odd$"), mirror(URL) as folder:
        write(folder, "x")
        raise error(f"{folder / 'x'} is odd")
    assert names(store) == ["x"] and not copies()
    assert not any(name.startswith(MARKER) for name in store)


def test_an_upload_that_fails_is_said_once_and_repeated(store, copies, monkeypatch, caplog):
    tried, put = [], MemoryFileSystem.put_file

    def sometimes(self, *args):
        tried.append(args)
        if len(tried) < 4:
            raise OSError("the network is down")
        put(self, *args)

    monkeypatch.setattr(MemoryFileSystem, "put_file", sometimes)
    with mirror(URL) as folder:
        write(folder, "x")
        wait_until(lambda: names(store) == ["x"])
    (said,) = [record.message for record in caplog.records if "failed" in record.message]
    assert said == f"{URL}: an upload failed, trying on (OSError: the network is down)"
    assert not copies()


def test_the_local_copy_is_kept_if_the_last_upload_fails(store, copies, monkeypatch, caplog):
    monkeypatch.setattr(MemoryFileSystem, "put_file", failing(PermissionError("quota")))
    message = rf"{URL}: the last upload failed, the files are in /.*/runs \(PermissionError: quota"
    with pytest.raises(OSError, match=message), mirror(URL) as folder:
        write(folder, "x")
    assert (folder / "x").exists() and len(copies()) == 1
    with pytest.raises(ZeroDivisionError), mirror("memory://other") as folder:
        write(folder, "x")
        raise ZeroDivisionError  # which is not hidden by the other error
    assert str(folder) in caplog.records[-1].message and (folder / "x").exists()


@pytest.mark.parametrize(
    ("marker", "part"), [("0-of-2", "0-of-2"), ("0-of-2", "0-of-3"), ("0-of-2", ""), ("", "")]
)
def test_a_share_is_one_process_s(store, copies, marker, part):
    mark(store, marker)
    held = r"process 1 on elsewhere, running since 12:00 and last seen \d s ago.*another one, or"
    with pytest.raises(ValueError, match=rf"^{URL}/.running-{marker}: {held}"), mirror(URL, part):
        pass
    with mirror(URL, None) as folder:  # a report
        write(folder, "table.txt")
    assert not copies() and MARKER + marker in store


def test_another_share_can_be_written_at_the_same_time(store):
    with mirror(URL, "0-of-2") as one, mirror(URL, "1-of-2") as other:
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), mirror(URL, "0-of-2"):
            pass
        write(one, "a"), write(other, "b")
    assert sorted(store) == ["/bucket/runs/a", "/bucket/runs/b"]


def test_a_share_whose_process_has_ended_is_taken_over(store, caplog):
    caplog.set_level("INFO")
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    here = {"host": socket.gethostname()}
    for how in ({"age": 200}, here | {"process": done.pid}):
        mark(store, "0-of-2", **how)
        with mirror(URL, "0-of-2"):
            assert json.loads(store[MARKER + "0-of-2"].getvalue())["process"] == os.getpid()
        assert any("0-of-2: taken over from process" in each.message for each in caplog.records)
        assert not store
        caplog.clear()


def test_a_sign_is_given_again_and_again(store):
    def time_of_sign():
        return json.loads(store[MARKER].getvalue())["time"] if MARKER in store else 0

    with mirror(URL):
        first = time_of_sign()
        wait_until(lambda: time_of_sign() > first)
        fsspec.filesystem("memory").rm_file(MARKER)
        wait_until(time_of_sign)
    assert not store


def test_a_sign_is_given_while_files_are_downloaded(store, monkeypatch):
    for name in "abc":
        fsspec.filesystem("memory").pipe_file(f"{URL}/{name}", b"")
    original, sent = MemoryFileSystem.get_file, []

    def slow(self, *args, **kwargs):
        time.sleep(0.05)
        sent.append(json.loads(store[MARKER].getvalue())["time"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow)
    monkeypatch.setattr(remote, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(1))
    with mirror(URL):
        pass
    assert sent == sorted({*sent}) and len(sent) == 3


def test_a_share_that_was_taken_over_is_not_written_any_more(store, caplog):
    message = "the files are in .*was taken over by process 1 on elsewhere"
    with pytest.raises(OSError, match=message), mirror(URL, "0-of-2") as folder:
        mark(store, "0-of-2")
        write(folder, "x")
        wait_until(lambda: "taken over" in caplog.text)
    assert (folder / "x").exists()
    assert [*store] == [MARKER + "0-of-2"]  # the other's


class NoCredentialsError(Exception):
    """As botocore's."""


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, NoCredentialsError])
def test_a_bucket_that_cannot_be_used_is_known_at_the_start(store, copies, monkeypatch, error):
    methods = {
        "find": rf"^{URL}: cannot be read; is there such a bucket.*{error.__name__}: no, such",
        "pipe_file": rf"^{URL}: cannot be written to \({error.__name__}: no, such",
    }
    for name, message in methods.items():
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, name, failing(error("no,\n such")))
            with pytest.raises(OSError, match=message), mirror(URL):
                pass
    assert not copies() and not store


def test_a_download_that_fails_leaves_nothing_behind(store, copies, monkeypatch):
    with mirror(URL) as folder:
        write(folder, "x")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", failing(OSError("cut")))
        with pytest.raises(OSError, match=r"cannot be read \(OSError: cut\)"), mirror(URL):
            pass
    assert not copies() and MARKER not in store
    with monkeypatch.context() as patch:  # another share has removed it
        patch.setattr(MemoryFileSystem, "get_file", failing(FileNotFoundError("x")))
        with mirror(URL, None) as folder:
            assert not (folder / "x").exists()
    assert names(store) == ["x"]


def test_unknown_protocols_and_missing_packages(store, copies, monkeypatch):
    message = r"^odd://a: unknown protocol 'odd', expected gs, s3 or"
    with pytest.raises(ValueError, match=message), mirror("odd://a"):
        pass
    needed = {"gs": "gcsfs", "s3": "s3fs"}
    with monkeypatch.context() as patch:
        patch.setattr(fsspec, "get_filesystem_class", failing(ImportError("Install it")))
        for protocol, package in needed.items():
            message = f"^{protocol}://a: Install it: pip install fsspec {package}$"
            with pytest.raises(ImportError, match=message), mirror(f"{protocol}://a"):
                pass
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"fsspec.*: pip install fsspec$"), mirror(URL):
        pass
    assert not copies()


@pytest.mark.parametrize("command", ["sweep", "shifts", "continual", "diagnose", "pretrain-mgg"])
def test_commands_write_to_a_url(store, copies, command):
    options = importlib.import_module(f"jaxtta.cli.{command.replace('-', '_')}").Options

    def main(given):
        given = getattr(given, "run", given)
        write(given.output, "x")
        assert (MARKER + ("0-of-1" if hasattr(given, "shard") else "")) in store

    cli.run_script(options, main, None, ["--output", URL])
    assert [*store] == ["/bucket/runs/x"] and not copies()


def test_ctrl_c_does_not_cut_the_last_upload(store, copies, monkeypatch, own_threads):
    put = MemoryFileSystem.put_file

    def slow_put(*args):
        time.sleep(0.5)
        put(*args)

    def main(options):
        write(options.output, "x")
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MemoryFileSystem, "put_file", slow_put)
    monkeypatch.setattr(cli, "_INSIST", 0.1)  # after which a run is interrupted again
    with pytest.raises(SystemExit, match="130"):
        cli.run_script(continual.Options, main, None, ["--output", URL])
    assert [*store] == ["/bucket/runs/x"] and not copies()


def test_two_shares_in_a_bucket_are_the_whole(store, copies, run_jaxtta, short, tmp_path):
    common = (*SWEEP[:-1], "--model", short, "--output")
    assert run_jaxtta(*common, tmp_path / "whole")[0] == 0
    assert run_jaxtta(*common, URL, "--dry-run")[0] == 0 and not store
    for shard in ("0/2", "1/2"):
        code, _, err = run_jaxtta(*common, URL, "--shard", shard)
        assert (code, f"{URL}: has all files of" in err) == (0, True)
    assert len(names(store)) == 5  # settings and two results each
    assert run_jaxtta(*common, URL)[0] == 0
    found = pd.read_csv(StringIO(store["/bucket/runs/summary.csv"].getvalue().decode()))
    whole = pd.read_csv(tmp_path / "whole/summary.csv")
    measured = [name for name in whole if "second" in name or "memory" in name]
    pd.testing.assert_frame_equal(found.drop(columns=measured), whole.drop(columns=measured))
    del store["/bucket/runs/table.txt"]
    assert run_jaxtta("report", URL)[0] == 0 and "table.txt" in names(store)
    assert run_jaxtta("report", URL, tmp_path / "whole", "--output", "memory://both")[0] == 0
    assert "/both/summary.csv" in store and not copies()


def test_errors_name_the_url(store, copies, run_jaxtta, short):
    folder = ("--model", short, "--output", URL)
    with mirror(URL) as local:
        write(local, "settings.json", "{}")
    code, _, err = run_jaxtta("sweep", *TEST, *folder)
    assert (code, f"error: {URL}: has results with no record of" in err) == (1, True)
    code, _, err = run_jaxtta("report", "memory://none")
    assert (code, "error: memory://none: has no predictions" in err) == (1, True)
    mark(store, "0-of-2")
    code, _, err = run_jaxtta("sweep", *TEST, *folder, "--shard", "0/2")
    assert (code, "process 1 on elsewhere" in err, errors_in(err)) == (1, True, 1)
    code, _, err = run_jaxtta("sweep", *TEST, *folder, "--shard", "2")
    assert (code, "--shard is '2', expected i/n" in err) == (1, True)
    assert not copies()


def test_a_sweep_that_was_stopped_goes_on(store, tmp_path):
    whole, run = sweep(tmp_path / "whole"), {"checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt), mirror(URL) as folder:
        sweep(folder, run=run, fatal=70)
    assert any(name.startswith("checkpoints/") for name in names(store))
    reads: list[int] = []
    with mirror(URL) as folder:
        assert same(sweep(folder, run=run, reads=reads), whole)
    assert len(reads) < 60
    assert [n for n in names(store) if not n.startswith("predictions/")] == ["settings.json"]
