import json
import shutil

import flax.serialization
import jax
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from jaxtta import models

TINY = GOLDEN / "tiny-clip"


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden checkpoint to spoil."""
    return shutil.copytree(TINY, tmp_path / "checkpoint")


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_all_formats_give_the_same_parameters(folder, tiny):
    _, expected = tiny
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(expected))
    equal(models.load(folder)[1], expected)
    (folder / "flax_model.msgpack").unlink()

    names = sorted(tensors)
    shards = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    equal(models.load(folder)[1], expected)


def test_save_and_load_round_trip(tiny, tmp_path, embedded):
    model, params = tiny
    models.save(tmp_path / "tiny", model, params)
    again, loaded = models.load(tmp_path / "tiny")
    equal(loaded, params)
    assert again.vision == model.vision
    assert again.text == model.text
    model, params = embedded
    models.save(tmp_path / "embedded", model, params)
    again, _ = models.load(tmp_path / "embedded")
    assert again.preprocessing == model.preprocessing
    task = models.zero_shot_task(again, ["cat", "dog"])
    np.testing.assert_array_equal(
        task.token_ids, models.zero_shot_task(model, ["cat", "dog"]).token_ids
    )


def test_parameters_of_init_are_those_of_a_checkpoint(tiny):
    model, params = tiny
    fresh = jax.jit(model.init)(jax.random.key(0))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params)


def test_dtype(folder):
    _, params = models.load(folder, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_missing_and_misshapen_parameters_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_projection.weight"]
    name = "vision_model.post_layernorm.weight"
    tensors[name] = tensors[name][:5]
    tensors["head.weight"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"text_projection/kernel is missing") as error:
        models.load(folder)
    assert "vision_model/post_layernorm/scale has shape (5,), expected (32,)" in str(error.value)
    assert "\n" not in str(error.value)


def test_unused_parameters_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["head.weight"] = np.zeros(3, np.float32)
    tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"not used: head/weight$"):
        models.load(folder)


def spoil_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_weights(folder):
    (folder / "model.safetensors").unlink()


def truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def spoil_msgpack(folder):
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(b"nonsense")


def spoil_index(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            place, _, key = key.rpartition("__")
            (config[place] if place else config)[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoil_pickle, ValueError, "pickled weights can run code"),
        (spoil_weights, FileNotFoundError, "has none of model.safetensors"),
        (truncate, ValueError, "is damaged or no safetensors file"),
        (spoil_msgpack, ValueError, "is damaged or no msgpack file"),
        (spoil_index, FileNotFoundError, "gone.safetensors: named in"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "is not JSON"),
        (edit_config(model_type="bert"), ValueError, "expected 'clip'"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "holds no JSON object"),
        (edit_config(vision_config__hidden_act="selu"), ValueError, "hidden_act is 'selu'"),
        (
            edit_config(vision_config__num_attention_heads=5),
            ValueError,
            "do not divide|not a multiple",
        ),
        (edit_config(vision_config__image_size=4), ValueError, "smaller than a patch"),
        (
            lambda f: (f / "preprocessor_config.json").write_text('{"size": "big"}'),
            ValueError,
            "cannot be read as preprocessing settings",
        ),
    ],
)
def test_bad_checkpoints_are_refused_in_one_sentence(folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        models.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["no/such/folder", "nobody/nothing"])
def test_missing_paths_are_refused(path):
    with pytest.raises(FileNotFoundError, match=r"is neither a local folder"):
        models.load(path)


def test_hub_models_are_fetched_file_by_file(monkeypatch, tiny, folder):
    """What the hub has is asked for name by name; pickles are never fetched."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repo, name, revision=None):
        asked.append(name)
        if (folder / name).exists():
            return str(folder / name)
        error = EntryNotFoundError.__new__(EntryNotFoundError)  # its signature differs by version
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    _, params = models.load("somebody/tiny-clip")
    equal(params, tiny[1])
    assert "model.safetensors" in asked
    assert not any(name.endswith((".bin", ".msgpack")) for name in asked)


def test_a_cached_hub_model_loads_without_network(monkeypatch, tiny, folder, tmp_path):
    """Also where the hub is known to lack an optional file."""
    import huggingface_hub

    cache = tmp_path / "cache" / "models--somebody--tiny-clip"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(folder, cache / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache.parent))
    with pytest.raises(FileNotFoundError, match="is neither a local folder"):
        models.load("somebody/tiny-clip")  # nobody knows whether it has a tokenizer
    (cache / ".no_exist" / "abc").mkdir(parents=True)
    files = models.checkpoints.files
    for name in (*files.PREPROCESSING_FILES, *files.TOKENIZER_FILES):
        (cache / ".no_exist" / "abc" / name).touch()
    equal(models.load("somebody/tiny-clip")[1], tiny[1])


def test_saving_over_the_models_own_folder(embedded, tmp_path):
    models.save(tmp_path, *embedded)
    model, params = models.load(tmp_path)
    models.save(tmp_path, model, jax.tree.map(lambda x: 2 * x, params))
    again, doubled = models.load(tmp_path)
    equal(doubled, jax.tree.map(lambda x: 2 * x, params))
    assert models.zero_shot_task(again, ["cat", "dog"]).classes == 2


def test_missing_tokenizer_is_one_sentence(tiny):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer"):
        models.zero_shot_task(tiny[0], ["cat", "dog"])
