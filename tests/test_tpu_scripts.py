"""The scripts of tpu/, with a gcloud that only remembers what it was asked."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TPU = Path(__file__).parents[1] / "tpu"
SCRIPTS = ("run_tpu.sh", "sweep_imagenet_c.sh", "preemptible.sh")
GIVEN = ("--zone", "us-west4-a", "--bucket", "gs://mine")


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
gcloud compute tpus tpu-vm ssh jaxtta-{i} --quiet --command 'cd jaxtta; PATH=$PWD/.venv/bin:$PATH \
flock ../sweep.lock bash tpu/sweep_imagenet_c.sh --bucket gs://mine --data gs://mine/data \
--shard {i}/{n} -- --severities 5 >> ../sweep.log 2>&1 || \
{{ tail -n 20 ../sweep.log; exit 1; }}' --zone us-west4-a
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
    assert {path.name for path in TPU.parent.iterdir()} >= {
        *re.findall(r"(?<= )\w[\w.]+(?= |$)", out.split("\n")[0].split(" -C ")[1])[1:]
    }


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
# node 1 is preempted during its first.
echo "$*" >> "$CLOUD/calls"
case "$*" in
    *"describe "*) cat "$CLOUD/${5}" 2> /dev/null || { echo "ERROR: NOT_FOUND" >&2; exit 1; } ;;
    *"resources create "*) echo READY > "$CLOUD/$5" ;;
    *"resources delete "*) rm "$CLOUD/$5" ;;
    *flock*)
        if [[ ! -e "$CLOUD/began-$5" ]]; then
            touch "$CLOUD/began-$5"
            [[ $5 != *-1 ]] || echo PREEMPTED > "$CLOUD/$5"
            exit 255
        fi
        cd "$CLOUD/home" && exec bash -c "$8"
        ;;
esac
"""
JAXTTA = r"""#!/usr/bin/env bash
printf '%s\n' "$@" > "$CLOUD/share-$(echo "$*" | sed 's,.*--shard \([0-9]*\)/.*,\1,')"
"""


@pytest.fixture
def cloud(tmp_path):
    """A folder for the cloud's nodes, and an environment whose gcloud keeps them there."""
    folder, programs = tmp_path / "the cloud", tmp_path / "bin"
    (folder / "home").mkdir(parents=True)
    (folder / "home" / "jaxtta").symlink_to(TPU.parent)
    programs.mkdir()
    for name, text in (("gcloud", GCLOUD), ("jaxtta", JAXTTA)):
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
        words = (folder / f"share-{node}").read_text().splitlines()
        assert words[-6:] == ["--shard", f"{node}/2", *given]
    assert out.splitlines()[-1].startswith("all shares are done")


def test_a_share_that_always_fails_is_given_up(cloud):
    folder, env = cloud
    shutil.rmtree(folder / "home")
    code, out, _ = run("preemptible.sh", *GIVEN, "--wait", "0", "--tries", "2", env=env)
    assert code == 1
    assert out.splitlines()[-1].endswith("jaxtta-0: given up after 2 errors in a row")
    assert (folder / "calls").read_text().count("flock") == 2


def test_a_failed_sweep_shows_its_last_lines(cloud):
    folder, env = cloud
    (folder / "began-jaxtta-0").touch()
    (folder / "home" / "jaxtta").unlink()
    (folder / "home" / "jaxtta" / "tpu").mkdir(parents=True)
    broken = folder / "home" / "jaxtta" / "tpu" / "sweep_imagenet_c.sh"
    broken.write_text("echo 'error: the bucket cannot be read' >&2; exit 1")
    code, out, _ = run("run_tpu.sh", "run", *GIVEN, env=env)
    assert code == 1
    assert "error: the bucket cannot be read" in out


def test_shares_cover_each_stream_once(run_jaxtta):
    """The `--shard`s that the scripts give, by the streams that a dry run lists."""
    listed = []
    for share in range(4):
        _, out, _ = run("run_tpu.sh", "run", *GIVEN, "--nodes", "4", "--node", str(share), "--dry-run")
        shard = re.search(r"--shard (\d/\d)", out)[1]
        options = ("--output", "nowhere", "--shard", shard, "--max-images", "2", "--dry-run")
        code, out, err = run_jaxtta("sweep", "--adapters", "zero_shot", *options)
        assert code == 0, err
        listed += re.findall(r"^(\S+), seed", out, re.M)
    assert sorted(listed) == sorted(f"{name}-1" for name in data.IMAGENET_C)


def commands():
    """Every jaxtta command of the README and the scripts, and what tpu/*.py are called with."""
    readme = (TPU / "README.md").read_text()
    text = "".join(re.findall(r"^```sh\n(.*?)^```", readme, re.M | re.S))
    for script in SCRIPTS:
        text += run(script, "run", *GIVEN, "--dry-run")[1] if script == "run_tpu.sh" else ""
    text += run("sweep_imagenet_c.sh", "--bucket", "gs://mine", "--shard", "0/1", "--dry-run")[1]
    for path in sorted(TPU.glob("*.py")):
        text += ast.get_docstring(ast.parse(path.read_text())) or ""
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r"\s*(jaxtta|python tpu/\S+\.py|bash tpu/\S+\.sh|gcloud) ", line):
            yield line.split(" # ")[0].strip()


@pytest.mark.parametrize("line", [*dict.fromkeys(commands())])
def test_a_command_that_is_shown_is_understood(line, monkeypatch):
    program, *words = shlex.split(line)
    if program == "bash":
        code, _, err = run(words[0].removeprefix("tpu/"), *words[1:], "--dry-run") if "--" not in words else run(
            words[0].removeprefix("tpu/"), *words[1 : words.index("--")], "--dry-run", *words[words.index("--"):]
        )
        assert code == 0, err
