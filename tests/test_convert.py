"""`jaxtta convert`: PyTorch's files to folders that `jaxtta.load` reads."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from conftest import GOLDEN, outcome
from safetensors.numpy import load_file, save_file
from test_openclip import all_shapes, random_weights, write_config

from jaxtta import assets, models
from jaxtta.cli.main import main
from jaxtta.models.checkpoints.weights import common_prefix

TINY = GOLDEN / "tiny-clip"
OPEN_CLIP = GOLDEN / "openclip-vit-quickgelu"
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `jaxtta` with arguments; returns its exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxtta", *map(str, arguments)])
        return outcome(main, capsys)

    return run


def test_its_help_teaches(command):
    code, out, _ = command("convert", "--help")
    assert code == 0
    assert "jaxtta convert ViT-B-32.pt vit-b-32" in out
    assert "weights_only=True" in out
    code, out, _ = command("--help")
    assert code == 0
    assert "convert" in out
    assert "weights_only" not in out


def test_what_is_asked_for_is_looked_at_first(command, tmp_path):
    code, _, err = command("convert", tmp_path / "no.pt", tmp_path / "out")
    assert (code, "no.pt: no such file" in err) == (1, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    code, _, err = command("convert", tmp_path / "no.pt", tmp_path / "full")
    assert (code, "full: exists; give the name of a new folder" in err) == (1, True)
    options = "--tokenizer", tmp_path / "full"
    code, _, err = command("convert", tmp_path / "full" / "a", tmp_path / "out", *options)
    assert (code, "full: has none of tokenizer_config.json, tokenizer.json" in err) == (1, True)


def test_without_pytorch_one_sentence(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    (tmp_path / "a.pt").touch()
    code, _, err = command("convert", tmp_path / "a.pt", tmp_path / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert "converting needs PyTorch, which is not installed here" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["a.b", "c"], ""),
        (["module.a", "module.b"], "module."),
        (["module._orig_mod.model.a", "module._orig_mod.model.b"], "module.model."),
        (["_orig_mod.a", "b"], ""),
        (["model.a", "head.b"], ""),
        ([], ""),
    ],
)
def test_prefixes(names, prefix):
    assert common_prefix(names) == prefix


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "clip_model.", "module.model."]
)
@pytest.mark.parametrize("folder", [TINY, OPEN_CLIP], ids=lambda folder: folder.name)
def test_prefixes_in_safetensors_are_taken_off(tmp_path, folder, prefix):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = next(copy.glob("*.safetensors"))
    save_file({prefix + name: array for name, array in load_file(file).items()}, file)
    jax.tree.map(np.testing.assert_array_equal, models.load(copy)[1], models.load(folder)[1])


# With PyTorch.


def tensors_of(folder, prefix=""):
    import torch

    file = next(folder.glob("*.safetensors"))
    return {prefix + name: torch.tensor(array) for name, array in load_file(file).items()}


def script(tensors):
    """A TorchScript module with these parameters, as OpenAI's archives are."""
    import torch

    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *places, leaf = name.split(".")
        module = root
        for place in places:
            if not hasattr(module, place):
                module.add_module(place, torch.nn.Module())
            module = getattr(module, place)
        module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    root.register_buffer("input_resolution", torch.tensor(32))
    root.register_buffer("vocab_size", torch.tensor(64))
    return torch.jit.script(root)


def same_models(a, b):
    """Whether two folders hold the same towers and parameters."""
    (model, params), (other, others) = models.load(a), models.load(b)
    assert (model.vision, model.text) == (other.vision, other.text)
    assert model.preprocessing == other.preprocessing
    jax.tree.map(np.testing.assert_array_equal, params, others)
    return True


OPENAI = {
    "model_cfg": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 64,
            "width": 64,
            "heads": 1,
            "layers": 2,
        },
    },
    "preprocess_cfg": {"size": 32},
}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 3], "width": 8, "patch_size": None}


@pytest.mark.parity
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_openais_archives_say_their_architecture(command, tmp_path, tower):
    config = json.loads(json.dumps(OPENAI))
    if tower == "resnet":
        config["model_cfg"]["vision_cfg"] = RESNET
    reference = tmp_path / "reference"
    reference.mkdir()
    write_config(reference, config)
    save_file(dict(random_weights(all_shapes(config))), reference / WEIGHTS)
    file, out = tmp_path / "ViT.pt", tmp_path / "new" / "out"
    script(tensors_of(reference)).save(file)
    with pytest.raises(
        ValueError, match=r"ViT.pt: pickled weights .*`jaxtta convert .*ViT.pt OUT`"
    ):
        models.load(file)
    code, said, err = command("convert", file, out, "--tokenizer", assets.MODEL)
    assert code == 0, err
    assert (
        f"preprocessing: {RESNET['image_size'] if tower == 'resnet' else 32}, shorter side" in said
    )
    assert "tokenizer: none" not in said
    assert (out / "merges.txt").exists()
    if tower == "resnet":  # the reference's preprocessing has another size there
        write_config(reference, config | {"preprocess_cfg": {"size": 64}})
    assert same_models(out, reference)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("given", "prefix"),
    [("beside", ""), ("whole", "module."), ("model_cfg", "_orig_mod."), ("beside", "model.clip.")],
)
def test_open_clips_training_checkpoints(command, tmp_path, given, prefix):
    import torch

    tensors = tensors_of(OPEN_CLIP, prefix)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(x) for x in tensors.values()]).state_dict()
    whole = {"epoch": 3, "name": "run", "state_dict": tensors, "optimizer": optimizer}
    file = tmp_path / "epoch_3.pt"
    torch.save(whole, file)
    arguments = []
    content = json.loads((OPEN_CLIP / "open_clip_config.json").read_text())
    if given == "beside":
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    else:
        content = content if given == "whole" else content["model_cfg"]
        (tmp_path / "ViT.json").write_text(json.dumps(content))
        arguments = ["--config", tmp_path / "ViT.json"]
    code, out, err = command("convert", file, tmp_path / "out", *arguments)
    assert code == 0, err
    assert "tokenizer: none; class names need one" in out
    assert f"from {tmp_path / 'out' / 'open_clip_config.json'}\n" in out
    assert same_models(tmp_path / "out", OPEN_CLIP)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("dtype", "sharded"), [("float32", False), ("float16", True), ("bfloat16", False)]
)
def test_transformers_pickles(command, tmp_path, dtype, sharded):
    import torch

    tensors = {k: x.to(getattr(torch, dtype)) for k, x in tensors_of(assets.MODEL).items()}
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(assets.MODEL, source, ignore=ignored)
    file = source / "pytorch_model.bin"
    if sharded:
        parts, names = ("a.bin", "b.bin"), list(tensors)
        weight_map = {name: parts[number % 2] for number, name in enumerate(names)}
        for part in parts:
            torch.save({k: x for k, x in tensors.items() if weight_map[k] == part}, source / part)
        file = source / "pytorch_model.bin.index.json"
        file.write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, file)
    with pytest.raises(ValueError, match=rf"`jaxtta convert {file} OUT`"):
        models.load(source)
    code, out, err = command("convert", file, tmp_path / "out")
    assert code == 0, err
    assert "tokenizer: none" not in out
    model, params = models.load(tmp_path / "out")
    assert model.preprocessing == models.load(assets.MODEL)[0].preprocessing
    expected = models.load(assets.MODEL)[1]
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), expected)
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    assert models.zero_shot_task(model, ["cat", "dog"]).classes == 2


@pytest.mark.parity
def test_others_parameters_are_left_out(command, tmp_path):
    import torch

    tensors = tensors_of(TINY, "clip_model.") | {"head.weight": torch.zeros(3)}
    torch.save({"model": tensors}, tmp_path / "a.pt")
    for name in ("vocab.json", "merges.txt"):  # beside the file, the configuration is elsewhere
        shutil.copy(assets.MODEL / name, tmp_path)
    code, out, err = command(
        "convert", tmp_path / "a.pt", tmp_path / "out", "--config", TINY / "config.json"
    )
    assert code == 0, err
    assert "tokenizer: none" not in out
    assert (tmp_path / "out" / "merges.txt").exists()
    assert "1 others are left out, head.weight for one" in err
    assert same_models(tmp_path / "out", TINY)


@pytest.mark.parity
def test_which_tokenizer_is_missing(command, tmp_path):
    """SigLIP's is another than CLIP's; spiece.model is one."""
    import torch

    siglip = TINY.parent / "tiny-siglip"
    torch.save(tensors_of(siglip), tmp_path / "a.pt")
    arguments = "convert", tmp_path / "a.pt", tmp_path / "out", "--config", siglip / "config.json"
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "tokenizer: none" in out
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "spiece.model").touch()
    code, out, err = command(*arguments)
    assert (code, "tokenizer: none" in out) == (0, False), err


class Anything:
    """A class that weights_only refuses."""


def bad_file(name):
    import torch

    tensors = tensors_of(OPEN_CLIP)
    return {
        "objects": {"state_dict": tensors, "args": Anything()},
        "list": [1, 2],
        "empty": {"epoch": 1},
        "other": {"conv.weight": torch.zeros(3)},
        "two": {f"{k}.{name}": x for k in ("a", "b") for name, x in tensors.items()},
        "lora": {"base_model.model.visual.lora_A.weight": torch.zeros(3)},
        "state": tensors,
        "theirs": tensors_of(TINY),
        "shape": tensors | {"visual.proj": torch.zeros(3, 3)},
        "nan": tensors | {"visual.proj": torch.full((64, 16), torch.nan)},
    }[name]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("objects", (), "holds Python objects besides tensors"),
        ("list", (), "holds no state dict"),
        ("empty", (), "holds no state dict"),
        ("other", (), "holds no CLIP under names of"),
        ("two", (), "holds 2 models"),
        ("lora", (), "merge_and_unload"),
        ("state", (), "does not say its activation; give --activation quick_gelu"),
        ("theirs", (), "give its config.json with --config"),
        ("theirs", ("--config", OPEN_CLIP / "open_clip_config.json"), "is not config.json, but"),
        ("state", ("--config", TINY / "config.json"), "is not open_clip_config.json, but"),
        ("shape", ("--config", OPEN_CLIP / "open_clip_config.json"), "has shape"),
        ("nan", ("--config", OPEN_CLIP / "open_clip_config.json"), "holds NaN or infinite"),
    ],
)
def test_files_that_cannot_be_converted_leave_nothing(command, tmp_path, name, options, message):
    import torch

    file = tmp_path / "a.pt"
    torch.save(bad_file(name), file)
    code, _, err = command("convert", file, tmp_path / "out", *options)
    assert (code, err.count("\n")) == (1, 1)
    assert message in err
    assert ".out." not in err  # the folder's name while it is made
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["archive", "script", "text", "pointer", "safetensors"])
def test_damaged_files_are_refused(command, tmp_path, kind):
    import torch

    file = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind in ("archive", "script", "safetensors"):
        torch.save(tensors_of(TINY), file)
        if kind == "script":
            script(tensors_of(TINY)).save(file)
        if kind == "safetensors":
            shutil.copy(TINY / "model.safetensors", file)
        file.write_bytes(file.read_bytes()[:5000])
    else:
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        file.write_text(pointer if kind == "pointer" else "weights")
    code, _, err = command("convert", file, tmp_path / "out", "--config", TINY / "config.json")
    assert (code, err.count("\n")) == (1, 1)
    assert f"{file}: " in err
    assert ("git lfs pull" in err) == (kind == "pointer")
