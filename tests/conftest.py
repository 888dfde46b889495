"""Shared by all tests: the tiny golden model and others; `../conftest.py` sets up devices."""

import dataclasses
import gc
import os
import runpy
import shutil
import sys
import threading
import types
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file

import jaxtta
from jaxtta import models
from jaxtta.cli import main as cli_main
from jaxtta.models.resnet import ResNet, ResNetArchitecture

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"
EXPERIMENTS = Path(__file__).parents[1] / "experiments"

# Where torchvision is installed beside the CPU build of torch, its compiled operators do not load.
# Nothing here needs them, but this part of it, which OpenCLIP imports, looks for them.
_OPERATORS = "torchvision._meta_registrations"
sys.modules.setdefault(_OPERATORS, types.ModuleType(_OPERATORS))

# What is imported stays, and JAX's traces are many objects of which few are garbage.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

hypothesis.settings.register_profile("dev", deadline=None, max_examples=8, derandomize=True)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=30, derandomize=False, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser):
    parser.addoption("--agreement", metavar="FILE", help="run the golden tests, write differences")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--agreement"):
        items[:] = [item for item in items if "agrees" in item.fixturenames]


def pytest_sessionfinish(session, exitstatus):
    file = session.config.getoption("--agreement")
    if file and exitstatus == 0:
        rows = [
            dict(zip(("method", "quantity"), key, strict=True)) | DIFFERENCES[key]
            for key in sorted(DIFFERENCES)
        ]
        pd.DataFrame(rows).to_csv(file, index=False, float_format="%.3g")


def pytest_configure(config):
    """Forget what was compiled once it fills a gigabyte; before anything is."""
    if config.getoption("--agreement") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--agreement is for one process, without -n")
    kept = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    files = [*kept.iterdir()] if kept.is_dir() else []
    alone = not hasattr(config, "workerinput")  # not one of xdist's workers
    if alone and sum(file.stat().st_size for file in files) > 1e9:
        shutil.rmtree(kept)


@pytest.fixture(scope="session")
def tiny():
    """The golden model with its parameters."""
    return jaxtta.load(GOLDEN / "tiny-clip")


@pytest.fixture(scope="session")
def siglip():
    """The golden SigLIP with its parameters."""
    return jaxtta.load(GOLDEN / "tiny-siglip")


@pytest.fixture(scope="session")
def embedded():
    """The embedded model with its parameters."""
    return jaxtta.load(jaxtta.assets.MODEL)


class NNXClassifier:
    """A user's classifier: a Flax NNX module with a list of layers."""

    image_size, mixes_batch, feature_shape = 32, False, (1, 16)

    def __init__(self):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.layers = nnx.List(
                    [nnx.Linear(48, 16, rngs=rngs), nnx.LayerNorm(16, rngs=rngs)]
                )
                self.head = nnx.Linear(16, 5, use_bias=False, rngs=rngs)

        self.graph, self.params = nnx.split(Net(nnx.Rngs(0)))

    def init_context(self, params, task):
        return params["head"]["kernel"].get_value()  # a leaf: donated states must not take it

    def __call__(self, params, context, batch):
        net = nnx.merge(self.graph, params)
        images = batch.images.reshape(len(batch.images), 4, 8, 4, 8, 3).mean((2, 4))
        features = images.astype(jnp.float32).reshape(len(images), 48)
        for layer in net.layers:
            features = layer(features)
        texts = net.head.kernel[...] / jnp.linalg.norm(net.head.kernel[...], axis=0)
        return jaxtta.Outputs(net.head(features), features, texts.T, features[:, None])


@pytest.fixture(scope="session")
def towers(tiny, siglip):
    """One model of each kind, small: (model, params, task) by name."""
    from transformers import ViTConfig

    clip, params = tiny
    task = models.task_from_token_ids(golden("clip_forward")["token_ids"])
    arch = ResNetArchitecture((1, 1, 1, 1), 8, 4)
    resnet = dataclasses.replace(clip, vision=ResNet(arch, 32))
    vit = models.classifier_from_config(
        ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            num_labels=5,
        )
    )
    nnx_model = NNXClassifier()
    return {
        "vit": (clip, params, task),
        "resnet": (resnet, jax.jit(resnet.init)(jax.random.key(1)), task),
        "siglip": (*siglip, models.task_from_token_ids(golden("siglip")["token_ids"])),
        "supervised": (vit, jax.jit(vit.init)(jax.random.key(2)), None),
        "nnx": (nnx_model, nnx_model.params, None),
    }


@pytest.fixture
def shared():
    """The folder of larger files that are not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not here")
    return SHARED


@pytest.fixture
def own_threads(monkeypatch):
    """An interrupted program waits for the threads that it has started, not for pytest-xdist's."""
    every, before = threading.enumerate, {*threading.enumerate()}
    monkeypatch.setattr(threading, "enumerate", lambda: [x for x in every() if x not in before])


@pytest.fixture
def run_script(monkeypatch, capsys, own_threads):
    """Run a script in this process; returns its exit code, output and errors."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend((EXPERIMENTS / name).parent)
        return outcome(lambda: runpy.run_path(str(EXPERIMENTS / name), run_name="__main__"), capsys)

    return run


@pytest.fixture
def run_jaxtta(monkeypatch, capsys, own_threads):
    """Run a `jaxtta` command in this process; returns its exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxtta", *map(str, arguments)])
        return outcome(cli_main.main, capsys)

    return run


def outcome(main, capsys):
    """Exit code, output and errors of a program in this process."""
    code = 0
    try:
        main()
    except SystemExit as leave:
        code = leave.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def errors_in(text):
    """How many errors a script has printed; each is one line, the last."""
    assert text.splitlines()[-1].startswith("error: ")
    return text.count("error: ")


def write_images(folder, per_class=4, names=None):
    """Write some of the bundled images as files in class folders."""
    bundled = jaxtta.data.open_dataset("folder", jaxtta.assets.IMAGES)
    for name in names or bundled.class_names:
        (folder / name).mkdir(parents=True)
        numbers = np.flatnonzero(bundled.labels == bundled.class_names.index(name))
        for place, number in enumerate(numbers[:per_class]):
            Image.fromarray(bundled[number]).save(folder / name / f"{place:04}.png")
    return folder


def bundled_image(name, number):
    """One of the bundled images, by its class and number there, as a PIL image."""
    bundled = jaxtta.data.open_dataset("folder", jaxtta.assets.IMAGES)
    return Image.fromarray(bundled[200 * bundled.class_names.index(name) + number])


def golden(name):
    """Open a golden file."""
    return np.load(GOLDEN / f"{name}.npz")


def relative(ours, reference):
    """‖a − b‖/‖b‖."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


# By method and quantity, in float32: the largest difference from the reference implementation.
DIFFERENCES: dict = {}


@pytest.fixture
def agrees():
    """Assert that numbers are those of a reference implementation, and note how nearly.

    `most` bounds the largest difference, `norm` the norm of the difference over the reference's.
    """

    def compare(method, quantity, ours, theirs, most=None, norm=None):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape
        gap, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
        share = np.linalg.norm(ours - theirs) / (np.linalg.norm(theirs) or 1)
        tolerance, bound = (most, "difference") if norm is None else (norm, "relative")
        if not jax.config.jax_enable_x64:
            new = dict(difference=gap, scale=scale, relative=share, tolerance=tolerance)
            old = DIFFERENCES.get((method, quantity), new)
            new = {key: float(max(new[key], old[key])) for key in new}
            DIFFERENCES[method, quantity] = new | {"bound": bound}
        measured = gap if norm is None else share
        assert measured <= tolerance, f"{method}, {quantity}: {measured}"

    return compare


def images_of(model, pixels):
    """Images in [0, 1] (or beyond) whose normalisation gives these pixels."""
    mean, std = (
        np.asarray(x, np.float32) for x in (model.preprocessing.mean, model.preprocessing.std)
    )
    return np.asarray(pixels) * std + mean


def changes(params, adapted, reference):
    """Our update of the normalisation parameters and a golden file's, each as one vector."""
    start, end = (flatten_dict(tree) for tree in (params, adapted))
    names = {path: "ln/" + ".".join(path).replace("scale", "weight") for path in end}
    assert set(names.values()) == {n for n in reference.files if n.startswith("ln/")}
    ours = np.concatenate([np.ravel(end[p] - start[p]) for p in end])
    return ours, np.concatenate([np.ravel(reference[names[p]] - start[p]) for p in end])


def size_of(tree):
    """Number of parameters in a tree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def save_vit(folder, config, params, version=5):
    """Write a supervised ViT under the parameter names of transformers 4 or 5."""
    config.save_pretrained(folder)
    flat = {".".join(path): np.asarray(x) for path, x in flatten_dict(params).items()}
    names = {
        "vision_model.embeddings": "vit.embeddings",
        "class_embedding": "cls_token",
        "position_embedding.embedding": "position_embeddings",
        "patch_embedding": "patch_embeddings.projection",
        "vision_model.post_layernorm": "vit.layernorm",
        "vision_model.encoder.layers": "vit.encoder.layer" if version == 4 else "vit.layers",
        "layer_norm1": "layernorm_before",
        "layer_norm2": "layernorm_after",
    }
    for ours, four, five in (
        ("self_attn.q_proj", "attention.attention.query", "attention.q_proj"),
        ("self_attn.k_proj", "attention.attention.key", "attention.k_proj"),
        ("self_attn.v_proj", "attention.attention.value", "attention.v_proj"),
        ("self_attn.out_proj", "attention.output.dense", "attention.o_proj"),
        ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
        ("mlp.fc2", "output.dense", "mlp.fc2"),
    ):
        names[ours] = four if version == 4 else five
    tensors = {}
    for name, array in flat.items():
        if name.endswith("kernel"):
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        name = name.replace("kernel", "weight").replace("scale", "weight")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name.endswith(("cls_token", "position_embeddings")):
            array = array.reshape(1, -1, config.hidden_size)
        tensors[name] = np.ascontiguousarray(array)
    tensors["vit.embeddings.patch_embeddings.projection.bias"] = np.zeros(
        config.hidden_size, np.float32
    )
    save_file(tensors, folder / "model.safetensors")
