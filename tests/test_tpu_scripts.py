"""The scripts of tpu/, with a gcloud that only remembers what it was asked, and its README."""

import ast
import functools
import importlib.util
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro
from conftest import errors_in, golden, outcome, write_images
from PIL import Image

import jaxtta
from jaxtta import adapters, assets, data, evaluate, models

TPU = Path(__file__).parents[1] / "tpu"
SCRIPTS = ("run_tpu.sh", "sweep_imagenet_c.sh", "preemptible.sh")
README = (TPU / "README.md").read_text()
GIVEN = ("--zone", "us-west4-a", "--bucket", "gs://mine")


def module_of(name):
    """A program of tpu/ as a module."""
    spec = importlib.util.spec_from_file_location(name, TPU / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.append(str(TPU))  # as for a program there
plan = module_of("plan")


def run(script, *arguments, **more):
    """Run a script; its exit code, output and errors."""
    done = subprocess.run(
        ["bash", TPU / script, *arguments], capture_output=True, text=True, timeout=60, **more
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", TPU / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", TPU / script], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_every_option(script):
    code, out, _ = run(script, "--help")
    assert code == 0
    assert out.startswith(f"usage: {script} ")
    for option in re.findall(
        r"^ +((?:--[a-z-]+ \| )+--[a-z-]+)\)", (TPU / script).read_text(), re.M
    ):
        for name in option.split(" | "):
            assert name in out or name == "--node"


NODE = """\
gcloud compute tpus queued-resources create jaxtta-{i} --node-id jaxtta-{i} \
--accelerator-type v5litepod-8 --runtime-version v2-alpha-tpuv5-lite --zone us-west4-a
"""
SHARE = """\
gcloud compute tpus tpu-vm ssh jaxtta-{i} --quiet '--ssh-flag=-o ServerAliveInterval=60' \
--command 'cd jaxtta || exit; PATH=$PWD/.venv/bin:$PATH flock ../sweep.lock \
bash tpu/sweep_imagenet_c.sh --bucket gs://mine --data gs://mine/data --shard {i}/{n} -- \
--severities 5 >> ../sweep.log 2>&1 || {{ tail -n 20 ../sweep.log; exit 1; }}' --zone us-west4-a
"""
REPORT = (
    SHARE.replace(" --shard {i}/{n}", "")
    + """\
gcloud storage rsync --recursive gs://mine/results results
"""
)
GONE = """\
gcloud compute tpus queued-resources delete jaxtta-{i} --force --quiet --zone us-west4-a
"""
LEFT = "gcloud compute tpus queued-resources list --zone us-west4-a\n"


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize(
    ("command", "each", "last"),
    [("create", NODE, ""), ("run", SHARE, ""), ("collect", "", REPORT), ("delete", GONE, LEFT)],
)
def test_a_dry_run_prints_every_command(command, each, last, nodes):
    expected = "".join(each.format(i=i, n=nodes) for i in range(nodes)) + last.format(i=0)
    options = (*GIVEN, "--nodes", str(nodes), "--dry-run", "--", "--severities", "5")
    assert run("run_tpu.sh", command, *options) == (0, expected, "")


def test_set_up_copies_installs_and_shows_the_chips():
    code, out, _ = run("run_tpu.sh", "setup", *GIVEN, "--nodes", "4", "--dry-run")
    assert code == 0
    assert out.startswith("tar --exclude __pycache__ -czf jaxtta.tar.gz -C ")
    assert out.count("tpu-vm scp --quiet jaxtta.tar.gz jaxtta-") == 4
    assert out.count("-c constraints/common.txt -c constraints/transformers5.txt") == 4
    assert out.count("print(jax.devices())") == 4
    packed = out.split("\n")[0].partition(" -C ")[2].split()[1:]
    assert {"jaxtta", "tpu", "benchmarks", "pyproject.toml"} < {*packed}
    assert all((TPU.parent / name).exists() for name in packed)


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_each_type_has_its_runtime(kind, runtime):
    _, out, _ = run("run_tpu.sh", "create", *GIVEN, "--type", kind, "--spot", "--dry-run")
    assert f"--accelerator-type {kind} --runtime-version {runtime} --spot" in out


def test_a_host_copies_the_data_and_sweeps():
    options = ("--bucket", "gs://mine/", "--copy", "/my data", "--shard", "1/4", "--dry-run")
    code, out, _ = run("sweep_imagenet_c.sh", *options, "--", "--seeds", "1", "2")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == [
        "mkdir -p '/my data'",
        "gcloud storage rsync --recursive gs://mine/data '/my data'",
    ]
    assert lines[2].startswith("jaxtta sweep --layout arrayrecord --data '/my data' ")
    assert lines[2].endswith(" --shard 1/4 --seeds 1 2")
    assert "--output gs://mine/results " in lines[2]
    code, out, _ = run("sweep_imagenet_c.sh", "--bucket", "gs://mine", "--data", "x", "--dry-run")
    assert (code, len(out.splitlines())) == (0, 1)  # no copy, no shard
    assert "--shard" not in out


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "run_tpu.sh",
            (),
            "expected a command, create, setup, run, watch, collect or delete, not ''",
        ),
        ("run_tpu.sh", ("creat",), "not 'creat'"),
        ("run_tpu.sh", ("create",), "--zone is missing"),
        ("run_tpu.sh", ("create", "--zone"), "--zone needs a value"),
        ("run_tpu.sh", ("create", "--zone", "z", "--nodes", "none"), "--nodes is 'none'"),
        ("run_tpu.sh", ("create", "--zone", "z", "--node", "1"), "--node is '1', expected 0 to 0"),
        (
            "run_tpu.sh",
            ("create", "--zone", "z", "--nodes", "9", "--node", "08"),
            "expected 0 to 8",
        ),
        ("run_tpu.sh", ("create", "--zone", "z", "--type", "v5litepod-16"), "one with one host"),
        ("run_tpu.sh", ("create", "--zone", "z", "--seeds", "2"), "'--seeds'; options of jaxtta"),
        (
            "run_tpu.sh",
            ("run", "--zone", "z", "--bucket", "mine"),
            "--bucket is 'mine', expected gs:",
        ),
        ("sweep_imagenet_c.sh", (), "--bucket is missing"),
        ("sweep_imagenet_c.sh", ("--bucket", "gs://b", "--shard", "1"), "--shard is '1', expected"),
        ("preemptible.sh", (), "--zone is missing"),
        ("preemptible.sh", (*GIVEN, "--type", "v9"), "--type is 'v9'"),
        ("preemptible.sh", (*GIVEN, "--wait", "soon"), "--wait needs a number"),
        ("preemptible.sh", (*GIVEN, "--node", "0"), "looks after all nodes"),
    ],
)
def test_bad_options_get_one_sentence(script, arguments, message):
    code, out, err = run(script, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err


GCLOUD = r"""#!/usr/bin/env bash
# A cloud in a folder: $CLOUD/NAME holds a node's state. The first sweep of node 0 fails, and
# node 1 is preempted during its first; its queued resource takes its time to notice.
echo "$*" >> "$CLOUD/calls"
case "$*" in
    *"describe "*)
        echo "WARNING: a newer gcloud is there" >&2
        state=$(cat "$CLOUD/$5" 2> /dev/null) || { echo "ERROR: NOT_FOUND: $5" >&2; exit 1; }
        if [[ $3 == queued-resources && $state == PREEMPTED ]]; then
            echo >> "$CLOUD/asked-$5"
            state=SUSPENDING
            (($(wc -l < "$CLOUD/asked-$5") < 3)) || state=SUSPENDED
        fi
        echo "$state"
        ;;
    *"resources create "*) echo READY > "$CLOUD/$5" ;;
    *"resources delete "*) rm "$CLOUD/$5" ;;
    *sweep_imagenet_c.sh*)
        if [[ ! -e "$CLOUD/began-$5" ]]; then
            touch "$CLOUD/began-$5"
            [[ $5 != *-1 ]] || echo PREEMPTED > "$CLOUD/$5"
            exit 255
        fi
        cd "$CLOUD/home" && exec bash -c "$9"
        ;;
esac
"""
TAR = r"""#!/usr/bin/env bash
touch "$4"
"""
JAXTTA = r"""#!/usr/bin/env bash
printf '%s\n' "$@" > "$CLOUD/share-$(echo "$*" | sed 's,.*--shard \([0-9]*\)/.*,\1,')"
"""


@pytest.fixture
def cloud(tmp_path):
    """A folder for the cloud's nodes, and an environment whose gcloud keeps them there."""
    folder, programs = tmp_path / "the cloud", tmp_path / "bin"
    installed = folder / "home" / "jaxtta" / "tpu"
    installed.mkdir(parents=True)
    for script in ("common.sh", "sweep_imagenet_c.sh"):
        shutil.copy(TPU / script, installed)
    programs.mkdir()
    for name, text in (("gcloud", GCLOUD), ("jaxtta", JAXTTA), ("tar", TAR)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    return folder, os.environ | {"PATH": path, "CLOUD": str(folder), "HOME": str(tmp_path)}


def test_a_preempted_node_is_made_again_until_every_share_is_done(cloud):
    folder, env = cloud
    options = (*GIVEN, "--nodes", "2", "--spot", "--wait", "0")
    given = ("--model", "my model's folder", "--adapters", "tent")
    code, out, err = run("preemptible.sh", *options, "--", *given, env=env)
    assert (code, err) == (0, "")
    calls = (folder / "calls").read_text()
    for node, times in ((0, 1), (1, 2)):
        assert calls.count(f"queued-resources create jaxtta-{node} ") == times
        assert calls.count(f"queued-resources delete jaxtta-{node} ") == times - 1
        assert out.count(f"jaxtta-{node}: share done") == 1
        does = re.findall(rf"jaxtta-{node}: (\w+)$", out, re.M)
        assert (
            does == (["create", "run", "run"], ["create", "run", "wait", "recreate", "run"])[node]
        )
        words = (folder / f"share-{node}").read_text().splitlines()
        assert words[-6:] == ["--shard", f"{node}/2", *given]
    assert out.splitlines()[-1].startswith("all shares are done")


def test_only_nodes_that_are_there_are_asked_for_their_log(cloud):
    folder, env = cloud
    (folder / "jaxtta-0").write_text("ACTIVE")
    (folder / "jaxtta-1").write_text("PROVISIONING")
    code, out, _ = run("run_tpu.sh", "watch", *GIVEN, "--nodes", "3", env=env)
    assert code == 0
    states = [f"jaxtta-{i} is {s}" for i, s in enumerate(("ACTIVE", "PROVISIONING", "not there"))]
    assert out.splitlines()[:3] == states
    calls = (folder / "calls").read_text()
    assert re.findall(r"ssh (\S+)", calls) == ["jaxtta-0"]
    assert "storage ls gs://mine/results/predictions/" in calls


def test_why_a_state_is_not_known_is_shown(cloud):
    folder, env = cloud
    program = folder.parent / "bin" / "gcloud"
    once = 'test -e "$CLOUD/asked" || { touch "$CLOUD/asked"; echo "no account" >&2; exit 1; }'
    program.write_text(program.read_text().replace("case", f"{once}\ncase", 1))
    code, out, err = run("preemptible.sh", *GIVEN, "--wait", "0", env=env)
    assert (code, err) == (0, "no account\n")
    assert re.findall(r"jaxtta-0: (\w+)$", out, re.M) == ["wait", "create", "run", "run"]


def test_nodes_that_are_left_are_listed_where_one_was_not_there(cloud):
    folder, env = cloud
    (folder / "jaxtta-1").write_text("ACTIVE")
    (folder / "jaxtta-2").write_text("ACTIVE")
    code, _, err = run("run_tpu.sh", "delete", *GIVEN, "--nodes", "2", env=env)
    assert code == 1
    assert "jaxtta-0" in err
    assert [path.name for path in folder.glob("jaxtta-*")] == ["jaxtta-2"]
    assert (folder / "calls").read_text().splitlines()[-1] == LEFT.strip().removeprefix("gcloud ")


@pytest.mark.parametrize("version", ["4.2", "5.1"])  # 4.2: also macOS's 3.2 quotes so
def test_a_printed_command_can_be_typed_in_any_bash(version):
    folder = "a friend's data & more"
    options = ("--bucket", "gs://mine", "--copy", folder, "--dry-run")
    env = os.environ | {"BASH_COMPAT": version}
    _, out, _ = run("sweep_imagenet_c.sh", *options, env=env)
    assert shlex.split(out.splitlines()[0]) == ["mkdir", "-p", folder]


def test_a_share_that_always_fails_is_given_up(cloud):
    folder, env = cloud
    shutil.rmtree(folder / "home")
    code, out, _ = run("preemptible.sh", *GIVEN, "--wait", "0", "--tries", "2", env=env)
    assert code == 1
    assert out.splitlines()[-1].endswith("jaxtta-0: given up after 2 errors in a row")
    assert (folder / "calls").read_text().count("sweep_imagenet_c.sh") == 2


def test_a_failed_sweep_shows_its_last_lines(cloud):
    folder, env = cloud
    (folder / "began-jaxtta-0").touch()
    broken = folder / "home" / "jaxtta" / "tpu" / "sweep_imagenet_c.sh"
    broken.write_text("echo 'error: the bucket cannot be read' >&2; exit 1")
    code, out, _ = run("run_tpu.sh", "run", *GIVEN, env=env)
    assert code == 1
    assert "error: the bucket cannot be read" in out


def test_shares_cover_each_stream_once(run_jaxtta, short, monkeypatch):
    listed = []

    def estimate(options, loaded, spec, specs, share):
        listed.extend(spec.streams[number].name for number in share)

    monkeypatch.setattr("jaxtta.cli.sweep.estimate", estimate)
    for node in ("0", "1", "2", "3"):
        options = (*GIVEN, "--nodes", "4", "--node", node, "--dry-run")
        share = re.search(r"--shard \S+", run("run_tpu.sh", "run", *options)[1])[0].split()
        how = ("--model", short, "--max-images", "2", "--output", "nowhere", "--dry-run")
        code, _, err = run_jaxtta("sweep", *how, *share)
        assert code == 0, err
    assert sorted(listed) == sorted(f"{name}-1" for name in data.IMAGENET_C)


def commands():
    """Every command of the README, of the programs' docstrings, and of a host's sweep."""
    texts = re.findall(r"^ *```sh\n(.*?)^ *```", README, re.M | re.S)
    texts += [ast.get_docstring(ast.parse(path.read_text())) or "" for path in TPU.glob("*.py")]
    texts.append(run("sweep_imagenet_c.sh", "--bucket", "gs://b", "--shard", "0/1", "--dry-run")[1])
    for text in texts:
        for line in map(str.strip, text.replace("\\\n", " ").splitlines()):
            if line.startswith(("jaxtta ", "python ", "bash ")):
                yield line


@pytest.mark.parametrize("line", [*dict.fromkeys(commands())])
def test_a_command_that_is_shown_is_understood(line, monkeypatch):
    line = line.replace("$ZONE", "us-west4-a").replace("$BUCKET", "gs://mine")
    program, *words = shlex.split(line)
    if program == "bash":
        end = words.index("--") if "--" in words else len(words)
        script = words[0].removeprefix("tpu/")
        code, out, err = run(script, *words[1:end], "--dry-run", *words[end:])
        assert (code, err) == (0, "")
        assert out
        program, words = "jaxtta", ["sweep", "--output", "results", *words[end + 1 :]]
    parsed = []

    def parse(options, main, doc, arguments=None, prog=None):
        parsed.append(tyro.cli(options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)))

    monkeypatch.setattr(jaxtta.cli, "run_script", parse)
    monkeypatch.setattr(jaxtta.cli.main, "run_script", parse)
    if program == "jaxtta":
        jaxtta.cli.main.main(words)
    else:
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.syspath_prepend(TPU.parent / Path(words[0]).parent)
        runpy.run_path(str(TPU.parent / words[0]), run_name="__main__")
    assert len(parsed) == 1


def test_the_table_of_chip_hours_is_what_is_computed():
    rows = re.findall(r"^\| (ViT-\S+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", README, re.M)
    assert {row[:2] for row in rows} == {
        (model, adapter) for model, known in plan.GFLOP_AN_IMAGE.items() for adapter in known
    }
    for model, adapter, gflop, *hours in rows:
        known = plan.GFLOP_AN_IMAGE[model][adapter]
        assert float(gflop.replace(",", "")) == known
        for cells, shown in zip((15, 75), hours, strict=True):
            seconds = known * 1e9 * 50_000 * cells / (0.4 * 197e12)
            assert float(shown) == pytest.approx(seconds / 3600, abs=0.006)


@pytest.mark.slow
def test_the_operations_are_those_that_are_counted():
    check = module_of("aot_check")
    known = plan.GFLOP_AN_IMAGE["ViT-B/16"]
    table = check.chip_hours(check.Options(models=("ViT-B/16",), adapters=(*known,)))
    rows = [row.replace(",", "").split() for row in table.splitlines()[2:]]
    assert {row[2]: float(row[3]) for row in rows} == pytest.approx(known, abs=0.06)  # rounded


STEPS = [plan.Step(0.1), plan.Step(0.1, 0.3)]  # 0.4 s a batch


@pytest.mark.parametrize(
    ("how", "rounds", "seconds", "busy", "bottleneck"),
    [
        ({"devices": 1}, 15, 15 * 10 * 0.4, 1, "HBM"),
        ({"devices": 8}, 2, 2 * 10 * 0.4, 15 / 16, "HBM"),
        ({"devices": 16, "hosts": 2}, 1, 10 * 0.4, 15 / 16, "HBM"),
        ({"devices": 256, "hosts": 32}, 1, 10 * 0.4, 15 / 256, "HBM"),
        ({"devices": 8, "split": "batch"}, 15, 15 * 10 * 0.4 / 8, 1, "HBM"),
        ({"devices": 1, "read": 200}, 15, 15 * 5, 0.8, "reading"),
        ({"devices": 8, "decode": 100}, 2, 80 + 70, 60 / 8 / 150, "host CPUs"),
        ({"devices": 8, "decode": 1900}, 2, 8000 / 1900 + 4, 60 / 8 / (8000 / 1900 + 4), "HBM"),
    ],
)
def test_a_plan_is_arithmetic(how, rounds, seconds, busy, bottleneck):
    found = plan.plan(15, 1000, 100, STEPS, **how)
    assert found.rounds == rounds
    assert found.seconds == pytest.approx(seconds)
    assert found.device_hours == pytest.approx(seconds * how["devices"] / 3600)
    assert found.busy == pytest.approx(busy)
    assert found.bottleneck == bottleneck


def test_a_step_is_its_operations_or_its_bytes():
    found = plan.step_of(76.2, 32.6, 64, plan.CHIPS["v5e"], 0.4)
    assert found == pytest.approx((76.2e9 * 64 / 78.8e12, 32.6 / 819))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"devices": 0}, "devices is 0, expected at least 1"),
        ({"devices": 9, "hosts": 2}, "9 devices are not a multiple of 2 hosts"),
        ({"devices": 1, "read": 0}, "read and decode are 0 and inf, expected above 0"),
    ],
)
def test_bad_plans_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(15, 1000, 100, STEPS, **how)


@pytest.fixture
def run_program(monkeypatch, capsys):
    """Run a program of tpu/ in this process; its exit code, output and errors."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return outcome(lambda: runpy.run_path(str(TPU / name), run_name="__main__"), capsys)

    return run


HOST = ("--read", "3000", "--decode", "500", "--cpus", "112")


def test_the_plan_is_printed(run_program):
    code, out, _ = run_program("plan.py", *HOST)
    assert code == 0
    assert "computed and not measured" in out
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert [lines[count].split()[-1] for count in ("1", "8", "256")] == [
        "compute",
        "reading",
        "compute",
    ]
    assert "HBM is without" not in out
    _, out, _ = run_program("plan.py", *HOST, "--adapters", "tent", "tnt:steps=3")
    assert out.splitlines()[-1].startswith("HBM is without tnt:steps=3: give --hbm-gb")
    code, out, _ = run_program("plan.py", *HOST, "--adapters", "own", "--step-seconds", "own=0.9")
    assert "measured steps" in out
    assert "HBM is without" not in out
    assert math.isclose(75 * 782 * 0.9 / 3600, float(out.splitlines()[3].split()[6]), rel_tol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapters", "own"), "--adapters has 'own': give its --step-seconds own=…"),
        (
            ("--step-seconds", "tent=fast"),
            "--step-seconds has 'tent=fast', expected ADAPTER=NUMBER",
        ),
        (("--hbm-gb", "own=3"), "--hbm-gb has 'own=3', expected ADAPTER=NUMBER, an adapter of"),
        (("--per-host", "0"), "--per-host is 0, expected at least 1"),
        (("--peak-share", "40"), "--peak-share is 40.0, expected above 0 and up to 1"),
    ],
)
def test_bad_options_of_a_plan(run_program, options, message):
    code, _, err = run_program("plan.py", *HOST, *options)
    assert (code, errors_in(err)) == (1, 1)
    assert message in err


WAIT, BATCH, STREAMS = 0.2, 4, 5


def waiting(began, model, task):
    """Zero-shot whose step waits, so that devices wait beside each other; notes when."""
    inner = adapters.zero_shot(model, task)

    def wait(logits):
        began.append(time.perf_counter())
        time.sleep(WAIT)
        return logits

    def step(params, state, batch):
        state, prediction = inner.step(params, state, batch)
        logits = jax.pure_callback(wait, prediction.logits, prediction.logits)
        return state, prediction._replace(logits=logits)

    return inner._replace(step=step)


class Slow:
    """Images that take their time to be read."""

    def __init__(self, count, pause):
        self.labels, self.class_names = np.zeros(count, np.int32), tuple("abcdef")
        self.pause = pause

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        time.sleep(self.pause)
        return np.full((32, 32, 3), number, np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "pause"), [(1, 0), (2, 0), (4, 0), (4, WAIT / BATCH)])
def test_a_plan_is_what_is_measured(tiny, devices, pause):
    """Within 20 %, from the first step to the last result; the rest is small beside the waits."""
    model, params = tiny
    token_ids = golden("clip_forward")["token_ids"]
    count, clean = 20 * BATCH, data.Domain(data.CLEAN)
    items = np.stack([np.zeros(count, int), np.arange(count)], 1)
    streams = [data.Stream(f"stream {k}", k, (clean,), (items,)) for k in range(STREAMS)]
    benchmark = {clean: Slow(count, pause)}
    spec = evaluate.Spec(benchmark, streams, models.task_from_token_ids(token_ids), BATCH)
    read = 1 / pause if pause else math.inf
    expected = plan.plan(STREAMS, count, BATCH, [plan.Step(WAIT)], devices, read=read)
    how = {"devices": devices, "workers": 0, "progress": False}
    began = []
    evaluate.sweep(spec, {"own": functools.partial(waiting, began)}, model, params, **how)
    ratio = (time.perf_counter() - began[0]) / expected.seconds
    assert len(began) == 20 * devices * expected.rounds  # idle devices step on masked batches
    print(f"{devices} devices, {expected.bottleneck}: {ratio:.3f} of the plan")
    assert 1 / 1.2 < ratio < 1.2


WNIDS = ("n01440764", "n01443537", "n01484850")


@pytest.fixture
def imagenet_c(tmp_path):
    """Some JPEG files in ImageNet-C's folders."""
    source = data.open_dataset("folder", assets.IMAGES)
    for place, (corruption, severity) in enumerate((("fog", 3), ("fog", 5), ("snow", 5))):
        for label, wnid in enumerate(WNIDS):
            folder = tmp_path / "images" / corruption / str(severity) / wnid
            folder.mkdir(parents=True)
            for number in range(5):
                image = Image.fromarray(source[200 * label + 5 * place + number])
                image.save(folder / f"ILSVRC2012_val_{number:08}.JPEG")
    return tmp_path / "images"


def pack(run_program, images, output, *options):
    return run_program("data_to_array_record.py", "--data", images, "--output", output, *options)


def test_packed_images_are_those_of_the_folder(run_program, imagenet_c, tmp_path):
    assert pack(run_program, imagenet_c, tmp_path / "all", "--images-per-shard", 4)[0] == 0
    folder, packed = (
        data.open_benchmark(layout, place, None)
        for layout, place in (("imagenet-c", imagenet_c), ("arrayrecord", tmp_path / "all"))
    )
    assert [*folder] == [*packed] == [("fog", 3), ("fog", 5), ("snow", 5)]
    for domain, images in folder.items():
        np.testing.assert_array_equal(packed[domain].labels, images.labels)
        assert (
            packed[domain].class_names
            == images.class_names
            == ("tench", "goldfish", "great white shark")
        )
        for number in range(15):
            np.testing.assert_array_equal(packed[domain][number], images[number])
            record = packed[domain].items[number]
            assert record["image"] == images.files[number].read_bytes()
            assert record["label"] == images.labels[number]
    assert len({images.content() for images in packed.values()}) == 3
    chosen = tmp_path / "ids.txt"
    chosen.write_text(f"{WNIDS[2]}/ILSVRC2012_val_00000001.JPEG\n")
    assert data.listed_subset(packed, chosen)[data.Domain("fog", 5)].labels.tolist() == [2]
    one = data.open_dataset("tfds", tmp_path / "all" / "fog" / "3")  # a domain is a tfds folder
    np.testing.assert_array_equal(one.labels, folder[data.Domain("fog", 3)].labels)
    assert one.class_names == folder[data.Domain("fog", 3)].class_names


def test_a_sweep_of_packed_images_is_that_of_the_folder(
    run_program, run_jaxtta, short, imagenet_c, tmp_path, monkeypatch
):
    assert pack(run_program, imagenet_c, tmp_path / "packed")[0] == 0
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", None)  # threads read both
    found = []
    for layout, place in (("imagenet-c", imagenet_c), ("arrayrecord", tmp_path / "packed")):
        options = ["--layout", layout, "--data", place, "--corruptions", "fog", "--model", short]
        options += ["--adapters", "zero_shot", "--workers", 2, "--batch-size", 8]
        code, _, err = run_jaxtta("sweep", *options, "--output", tmp_path / layout)
        assert code == 0, err
        found.append(evaluate.load_predictions(tmp_path / layout)[0].rows)
    np.testing.assert_array_equal(found[0], found[1])


def test_packing_goes_on_where_it_was_stopped(run_program, imagenet_c, tmp_path):
    bad = imagenet_c / "fog" / "5" / WNIDS[2] / "ILSVRC2012_val_00000002.JPEG"
    kept = bad.read_bytes()
    bad.unlink()
    code, _, err = pack(run_program, imagenet_c, tmp_path / "packed", "--images-per-shard", 4)
    assert (code, errors_in(err)) == (1, 1)
    assert f"{bad}: No such file" in err
    files = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "packed").rglob("*.array_record*")
    }
    assert len(files) == 4 + 3  # whole shards alone
    with pytest.raises(ValueError, match="severity 5, expected one of fog-3"):
        data.select(
            data.open_benchmark("arrayrecord", tmp_path / "packed", None), [data.Domain("fog", 5)]
        )
    bad.write_bytes(kept)
    assert pack(run_program, imagenet_c, tmp_path / "packed", "--images-per-shard", 4)[0] == 0
    assert all(path.stat().st_mtime_ns == written for path, written in files.items())
    assert len([*(tmp_path / "packed").rglob("*.array_record*")]) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images-per-shard", 0), "--images-per-shard is 0, expected at least 1"),
        (("--corruptions", "rain"), "--corruptions has 'rain', "),
        (("--severities", 4), "--severities has 4, "),
        (
            ("--corruptions", "snow", "--severities", 3),
            "none of these corruptions at these severities",
        ),
        (("--layout", "folder"), "expected at least two class folders"),
        (("--layout", "cifar-c"), "labels.npy: No such file"),
    ],
)
def test_bad_options_of_packing(run_program, imagenet_c, tmp_path, options, message):
    code, _, err = pack(run_program, imagenet_c, tmp_path / "packed", *options)
    assert (code, errors_in(err)) == (1, 1)
    assert message in err


def test_images_that_are_changed_when_read_are_not_packed(run_program, tmp_path):
    own = write_images(tmp_path / "own", 1, ("cat", "dog"))
    code, _, err = pack(run_program, own, tmp_path / "packed", "--layout", "folder")
    assert (code, errors_in(err)) == (1, 1)
    assert "--layout folder: its images are not files that are read as they are stored" in err


def test_packed_folders_are_checked(run_program, imagenet_c, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    with pytest.raises(FileNotFoundError, match=r"images\.json: no such file"):
        data.open_benchmark("arrayrecord", packed, None)
    assert pack(run_program, imagenet_c, packed, "--corruptions", "snow")[0] == 0
    _, _, err = pack(run_program, imagenet_c, packed, "--images-per-shard", 3)
    assert "of other images or shards; choose another --output" in err
    shard = next((packed / "snow" / "5").glob("*.array_record*"))
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"packed: is not what .*snow-5 lacks some of its 15 images"
    ):
        data.open_benchmark("arrayrecord", packed, None)
    (packed / "snow" / "5" / "dataset_info.json").unlink()
    with pytest.raises(
        ValueError, match=r"packed: is not what .*no <corruption>/<severity> is fin"
    ):
        data.open_benchmark("arrayrecord", packed, None)
    (packed / "images.json").write_text("{}")
    with pytest.raises(ValueError, match=r"packed: is not what .*'labels'"):
        data.open_benchmark("arrayrecord", packed, None)
