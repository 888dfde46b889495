"""Bundles: what is whole and of the same model is installed, anything else is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import errors_in
from hypothesis import given
from hypothesis import strategies as st

import jaxtta
from jaxtta import adapters, assets, models
from jaxtta.deploy import bundle
from jaxtta.deploy.bundle import install, load_bundle, revert, save_bundle, verify
from jaxtta.deploy.manifest import aliases_of
from jaxtta.deploy.setup import Setup, digest_of_state, fingerprint_of

CLASSES = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def setup(short):
    return Setup("tent:lr=1e-2", CLASSES, model=str(short), batch_size=2, min_adapt=1)


@pytest.fixture(scope="module")
def loaded(setup):
    return setup.load()


@pytest.fixture(scope="module")
def session(setup, loaded):
    return setup.session(*loaded)


@pytest.fixture(scope="module")
def made(session, setup, tmp_path_factory):
    """Three bundles of different states."""
    folder, paths = tmp_path_factory.mktemp("bundles"), []
    for steps in range(3):
        session.steps = steps
        session.state = session.state._replace(seen=np.int32(steps))
        paths.append(save_bundle(folder, session, setup))
    return paths


def copied(path, folder):
    """A copy of a bundle that may be written to."""
    copy = folder / path.name
    shutil.copytree(path, copy)
    for file in copy.iterdir():
        file.chmod(0o644)
    return copy


def forged(path, folder, change):
    """A copy whose manifest was changed, and whose name fits."""
    copy = copied(path, folder)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((copy / "manifest.json").read_bytes()).hexdigest()
    return copy.rename(folder / digest)


def test_a_bundle_gives_the_state_and_settings_back(made, loaded, session, setup, tmp_path):
    digest = install(made[2], tmp_path / "store")
    found = load_bundle(tmp_path / "store" / "current", *loaded)
    assert digest == made[2].name
    assert found.setup == setup
    assert found.counters == {"steps": 2, "seen": 0, "updates": 0}
    for own, saved in zip(
        jax.tree.leaves(session.state), jax.tree.leaves(found.state), strict=True
    ):
        np.testing.assert_array_equal(own, saved)
        assert own.dtype == saved.dtype
    after = found.session(*loaded)
    assert (after.steps, after.digest) == (2, digest_of_state(session.state))
    assert not os.access(tmp_path / "store" / digest / "manifest.json", os.W_OK) or not os.getuid()
    assert (tmp_path / "store" / digest / "manifest.json").stat().st_mode & 0o222 == 0


@pytest.mark.slow
def test_a_session_goes_on_from_a_bundle_bit_for_bit(setup, loaded, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 2, 32, 32, 3), np.uint8)
    session = setup.session(*loaded)
    session.answer([*images[0]], "ab")
    path = save_bundle(tmp_path, session, setup)
    after = load_bundle(path, *loaded).session(*loaded)
    for batch in images[1:]:
        own, other = session.answer([*batch], "ab"), after.answer([*batch], "ab")
        assert session.digest == after.digest
        np.testing.assert_array_equal([x.scores for x in own], [x.scores for x in other])
        assert [x[4:] for x in own] == [x[4:] for x in other]


def test_a_setup_of_a_gpu_is_loaded_without_one(short, caplog):
    """One made with cuDNN's attention goes on elsewhere; old ones say nothing of it."""
    given = {"adapter": "tent", "class_names": list(CLASSES), "model": str(short)}
    assert not Setup.of(given).fused_attention
    half = Setup.of(given | {"compute_dtype": "bfloat16", "fused_attention": True})
    model, _ = half.load()
    assert model.vision.arch.fused_attention is None
    assert "fused attention is off: JAX has no GPU here" in caplog.text
    assert half.identity == Setup.of(given | {"compute_dtype": "bfloat16"}).identity


def test_noise_maps_generators_and_statistics_are_in_the_bundle(loaded, setup, tmp_path):
    model, params = loaded
    noise, statistics = tmp_path / "noise.safetensors", tmp_path / "here.safetensors"
    values = np.full((32, 32, 3), 0.01, np.float32)
    adapters.save_noise(noise, values, adapters.TNTConfig(views=1, steps=0))
    moments = np.ones(model.feature_shape, np.float32)
    models.save_statistics(statistics, models.FeatureStatistics(np.float32(9), moments, moments))
    given = {"class_names": CLASSES, "model": setup.model}
    for own, files in (
        (Setup("tnt:steps=0,views=1", noise=str(noise), **given), {"noise"}),
        (Setup(f"guarded:mgtta:statistics={statistics},lr=1e-2", **given), {"phi", "statistics"}),
        (Setup(f"mgtta:statistics={statistics},optimizer=sgd", **given), {"statistics"}),
    ):
        path = save_bundle(tmp_path / "bundles", own.session(model, params), own)
        stored = {name: f"{name}.safetensors" for name in files}
        assert verify(path)["files"].keys() == {"state.safetensors", *stored.values()}
        found = load_bundle(path, model, params)
        assert found.setup.files == {name: path / file for name, file in stored.items()}
    np.testing.assert_array_equal(values, adapters.load_noise(noise)[0])
    same = (tmp_path / "bundles").rglob("phi.safetensors")
    assert {file.read_bytes() for file in same} == {assets.PHI.read_bytes()}


@given(st.lists(st.integers(0, 3), max_size=8))
def test_aliases_are_the_last_two_installed_or_reverted(made, tmp_path_factory, actions):
    store = tmp_path_factory.mktemp("store")
    current = previous = None
    for action in actions:
        if action < 3:
            install(made[action], store)
            if made[action].name != current:
                current, previous = made[action].name, current
        elif previous is None:
            with pytest.raises(ValueError, match="has no previous bundle"):
                revert(store)
        else:
            assert revert(store) == previous
            current, previous = previous, current
        assert aliases_of(store) == {"current": current, "previous": previous}
        for name in filter(None, (current, previous)):
            verify(store / name)


@given(st.data())
def test_a_flipped_bit_anywhere_is_noticed_and_nothing_is_installed(made, tmp_path_factory, data):
    folder, store = tmp_path_factory.mktemp("bundle"), tmp_path_factory.mktemp("store")
    install(made[1], store)
    copy = copied(made[0], folder)
    file = data.draw(st.sampled_from(sorted(copy.iterdir())))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    for use in (verify, lambda path: install(path, store)):
        with pytest.raises(ValueError, match=r"was changed") as error:
            use(copy)
        assert str(error.value).startswith(f"{copy}: ")
    assert aliases_of(store) == {"current": made[1].name, "previous": None}
    assert [path.name for path in bundle.bundles_in(store)] == [made[1].name]
    assert {path.name for path in store.iterdir()} == {made[1].name, "aliases.json", ".lock"}


def test_incomplete_bundles_links_and_other_files_are_refused(made, tmp_path):
    def refused(change, match):
        store = tmp_path / "store"
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        (tmp_path / "copy").mkdir()
        copy = copied(made[0], tmp_path / "copy")
        copy = change(copy) or copy
        for use in (verify, lambda path: install(path, store)):
            with pytest.raises(ValueError, match=match):
                use(copy)
        assert not [*store.glob("*")] or [x.name for x in store.iterdir()] == [".lock"]

    outside = tmp_path / "outside"
    shutil.copyfile(made[0] / "state.safetensors", outside)

    def linked(copy):
        (copy / "state.safetensors").unlink()
        (copy / "state.safetensors").symlink_to(outside)

    def piped(copy):
        (copy / "state.safetensors").unlink()
        os.mkfifo(copy / "state.safetensors")

    refused(linked, "state.safetensors is a link or no file")
    refused(piped, "state.safetensors is a link or no file")
    refused(lambda copy: (copy / "state.safetensors").unlink(), "state.safetensors is missing")
    refused(lambda copy: (copy / "manifest.json").unlink(), "it has no manifest.json")
    refused(lambda copy: (copy / "noise.safetensors").mkdir(), "is a link or no file")
    refused(lambda copy: (copy / "state.pkl").write_text(""), "state.pkl is no file of a bundle")
    refused(lambda copy: (copy / "phi.safetensors").write_text(""), "is not in its manifest")
    refused(lambda copy: copy.rename(copy.with_name("mine")), "not that of the folder's name")
    with pytest.raises(FileNotFoundError, match="no such bundle"):
        install(tmp_path / "none", tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="has no current bundle"):
        verify(tmp_path / "store" / "current")


def test_a_manifest_cannot_name_files_modules_or_formats_of_its_own(made, tmp_path):
    def refused(change, match):
        path = forged(made[0], tmp_path, change)
        for use in (verify, lambda path: install(path, tmp_path / "store")):
            with pytest.raises(ValueError, match=match):
                use(path)
        shutil.rmtree(path)

    def in_setup(**values):
        return lambda manifest: manifest["setup"].update(values)

    refused(lambda m: m.update(format=2), "of format 2, this version of jaxtta has 1")
    refused(lambda m: m["files"].update({"../../up": {}}), "not those of its settings")
    refused(lambda m: m["files"].pop("state.safetensors"), "is not in its manifest|not those of")
    refused(in_setup(phi="../phi.safetensors"), "not those of its settings")
    refused(in_setup(noise="/etc/passwd", adapter="tnt"), "not those of its settings")
    refused(in_setup(adapter="mgtta:phi=/etc/passwd"), "lacks the file with the phi")
    refused(in_setup(adapter="os:system"), "os:system is no adapter of jaxtta's")
    refused(in_setup(adapter="guarded:os:system"), "is no adapter of jaxtta's")
    refused(in_setup(batch_size="8"), "batch_size is '8'")
    refused(in_setup(other=1), "other")
    refused(in_setup(compute_dtype="int7"), "compute_dtype is 'int7', expected float32")
    for odd in ("-" * 9999 + "1", "-" * 2000 + "1", "{[]:1}"):
        refused(in_setup(adapter=f"tent:lr={odd}"), "lr is .*, expected a positive")
    refused(in_setup(adapter="guarded:tent", policy={"share": 5}), "share is 5, expected 0 to 1")
    refused(lambda m: m.update(setup=3), "lacks setup")
    refused(lambda m: m["model"].clear(), "lacks the model's fingerprint")
    path = forged(made[0], tmp_path, lambda m: None)
    (path / "manifest.json").write_text("[" * 100000)
    digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="is not valid JSON"):
        verify(path.rename(tmp_path / digest))


def test_another_models_bundle_is_refused(made, loaded, tmp_path):
    model, params = loaded
    other = {**params, "logit_scale": params["logit_scale"] + 1}
    with pytest.raises(ValueError, match=r"is the bundle of another model .*: its weights have"):
        load_bundle(made[0], model, other)
    with pytest.raises(ValueError, match="is the bundle of another model"):
        install(made[0], tmp_path / "store", fingerprint_of(model, other))
    assert aliases_of(tmp_path / "store")["current"] is None
    foreign = forged(made[0], tmp_path, lambda m: m["model"].update(weights="00"))
    install(made[1], tmp_path / "store")
    with pytest.raises(ValueError, match="is the bundle of another model"):
        install(foreign, tmp_path / "store")
    assert aliases_of(tmp_path / "store") == {"current": made[1].name, "previous": None}
    (tmp_path / "store" / made[1].name / "state.safetensors").unlink()  # a broken one is replaced
    install(foreign, tmp_path / "store")
    assert aliases_of(tmp_path / "store")["current"] == foreign.name
    with pytest.raises(ValueError, match=r"state\.safetensors is missing"):
        revert(tmp_path / "store")
    assert aliases_of(tmp_path / "store")["current"] == foreign.name
    install(made[1], tmp_path / "store", fingerprint_of(model, params))
    assert revert(tmp_path / "store") == foreign.name


def test_adapters_of_ones_own_cannot_be_bundled(session, tmp_path):
    with pytest.raises(ValueError, match="is no adapter of jaxtta's"):
        save_bundle(tmp_path / "new", session, Setup("mine:make", CLASSES))
    assert not (tmp_path / "new").exists()


def test_the_command_makes_installs_lists_reverts_and_verifies(
    run_jaxtta, session, short, tmp_path
):
    state, store = tmp_path / "state.safetensors", tmp_path / "store"
    session.save(state)
    code, out, err = run_jaxtta("bundle", "create", state, tmp_path / "bundles")
    assert code == 0, err
    first = Path(out.strip())
    assert verify(first)["setup"]["adapter"] == "tent:lr=1e-2"
    assert (
        run_jaxtta("bundle", "install", first, store, "--model", short)[1].split()[1] == first.name
    )
    session.steps += 1
    session.save(state)
    second = Path(run_jaxtta("bundle", "create", state, tmp_path / "bundles")[1].strip())
    assert run_jaxtta("bundle", "install", second, store)[0] == 0
    assert run_jaxtta("bundle", "revert", store)[1] == f"current: {first.name}\n"
    lines = {line.split()[4]: line for line in run_jaxtta("bundle", "list", store)[1].splitlines()}
    assert lines[first.name].split()[5:] == ["current"]
    assert lines[second.name].split()[5:] == ["previous"]
    assert lines[first.name].split()[1:3] == ["tent:lr=1e-2", "clip"]
    assert run_jaxtta("bundle", "verify", store)[1].count(": ok\n") == 2
    assert run_jaxtta("bundle", "verify", store / "current", "--model", short)[0] == 0
    code, _, err = run_jaxtta("bundle", "verify", store / "current", "--model", assets.MODEL)
    assert code == 1
    (store / second.name / "state.safetensors").unlink()
    code, out, _ = run_jaxtta("bundle", "verify", store)
    assert (code, out.count(": ok\n"), out.count("is missing\n")) == (1, 1, 1)
    assert "damaged" in run_jaxtta("bundle", "list", store)[1]
    code, _, err = run_jaxtta("bundle", "revert", store)
    assert (code, errors_in(err)) == (1, 1)
    code, _, err = run_jaxtta("bundle", "create", jaxtta.assets.PHI, tmp_path)
    assert (code, errors_in(err)) == (1, 1)


KILLED = """
import os, random, signal, sys, time
from jaxtta.deploy.bundle import install, revert, verify
from jaxtta.deploy.manifest import aliases_of
store, *paths = sys.argv[1:]
draw, seen = random.Random(0), set()
for round in range(40):
    if (child := os.fork()) == 0:
        while True:
            for path in paths:
                install(path, store)
            revert(store)
    time.sleep(draw.random() / 10)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    aliases = aliases_of(store)
    assert aliases["current"] != aliases["previous"], aliases
    for name in filter(None, aliases.values()):
        verify(f"{store}/{name}")
    seen.add(aliases["current"])
print(len(seen))
"""


@pytest.mark.slow
def test_a_store_is_whole_whenever_a_process_is_killed(made, tmp_path):
    store = tmp_path / "store"
    install(made[2], store)
    command = [sys.executable, "-c", KILLED, store, *made]
    assert int(subprocess.run(command, check=True, capture_output=True).stdout) > 1
    install(made[0], store)
    assert not [*store.glob(".new-*")]
