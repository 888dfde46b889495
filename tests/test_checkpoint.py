import dataclasses
import json
import shutil

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file
from test_preprocess import image, theirs

from jaxtta import assets, models
from jaxtta.models import Preprocessing

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


def test_names_that_do_not_fit_are_counted(folder):
    tensors = load_file(folder / "model.safetensors")
    spoilt = {f"student.{name}": array for name, array in tensors.items()}
    spoilt |= {"head.weight": np.zeros(3, np.float32)}
    save_file(spoilt, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit") as error:
        models.load(folder)
    count = len(tensors)
    assert f"{count} of {count} parameters are missing, " in str(error.value)
    assert f"; {count + 1} others are there, head/weight for one" in str(error.value)
    assert len(str(error.value)) < 400 + len(str(folder))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_are_not_finite_are_refused(folder, value, dtype):
    tensors = load_file(folder / "model.safetensors")
    tensors = {
        name: array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        for name, array in tensors.items()
    }
    models.load(write_weights(folder, tensors))
    array = tensors["vision_model.post_layernorm.weight"]
    array[3] = value
    with pytest.raises(ValueError, match=r"post_layernorm/scale holds NaN or infinite values"):
        models.load(write_weights(folder, tensors))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "float8_e4m3fn"])
def test_quantised_weights_are_refused(folder, dtype):
    """Their scales are elsewhere; as floats they would be another model."""
    tensors = load_file(folder / "model.safetensors")
    name = "visual_projection.weight"
    tensors[name] = tensors[name].astype(getattr(ml_dtypes, dtype, dtype))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"visual_projection[./]\w+ is (u?int|F8).*, expected "):
        models.load(folder)


def test_large_weights_are_finite(folder):
    """Their sum is not."""
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.final_layer_norm.bias"][:] = 3e38
    models.load(write_weights(folder, tensors))


def write_weights(folder, tensors):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_half_precision_shards(folder, tiny):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    kinds = ml_dtypes.bfloat16, np.float16
    weight_map = {name: f"{number % 2}.safetensors" for number, name in enumerate(names)}
    for number, kind in enumerate(kinds):
        part = {n: tensors[n].astype(kind) for n in names[number::2]}
        save_file(part, folder / f"{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    _, params = models.load(folder)
    for a, b in zip(*map(jax.tree.leaves, (params, tiny[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-6)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 600000000\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_git_lfs_pointers_are_recognised(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name}: is a git-LFS pointer.*`git lfs pull`"):
        models.load(folder)


def test_git_lfs_pointers_among_shards_are_recognised(folder):
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "a.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=r"a.safetensors: is a git-LFS pointer"):
        models.load(folder)


def spoil_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_a_pickle(folder):
    for file in folder.iterdir():
        file.unlink()
    for name in ("epoch_32.pt", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(b"weights")


def spoil_map(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')


def spoil_lora(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def spoil_name(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


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
        (spoil_pickle, ValueError, r"pickled weights can run code .*`jaxtta convert .*bin OUT`"),
        (only_a_pickle, ValueError, r"epoch_32.pt: pickled .*`jaxtta convert .*epoch_32.pt OUT`"),
        (spoil_map, ValueError, "is not an index of sharded"),
        (spoil_lora, ValueError, r"LoRA adapter .*merge_and_unload\(\)"),
        (spoil_name, FileNotFoundError, "model.fp16.safetensors would be read under the name mod"),
        (edit_config(vision_config__image_size=[32, 48]), ValueError, "config.json: image_size is"),
        (edit_config(text_config__eos_token_id=None), ValueError, "config.json: text_config.eos_"),
        (edit_config(text_config__eos_token_id=[1, 2]), ValueError, "expected one token id"),
        (spoil_weights, FileNotFoundError, "has none of model.safetensors"),
        (truncate, ValueError, "is damaged or no safetensors file"),
        (spoil_msgpack, ValueError, "is damaged or no msgpack file"),
        (spoil_index, FileNotFoundError, "gone.safetensors: named in"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "is not JSON"),
        (edit_config(model_type="bert"), ValueError, "supported are clip, siglip, vit"),
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


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nobody/x/y", "nor a model's id .OWNER/NAME. on the Hugging Face Hub$"),
        ("no/such/folder", "nor a model's id .OWNER/NAME. on the Hugging Face Hub$"),
        ("nobody/nothing", "HF_HUB_OFFLINE is set, so that the hub is not asked; unset it, or"),
        ("hf-hub:laion/CLIP-ViT-B-32", "; give laion/CLIP-ViT-B-32$"),
        ("hf_hub:timm/ViT-B-16-SigLIP", "; give timm/ViT-B-16-SigLIP$"),
        ("https://huggingface.co/openai/clip", "; give openai/clip$"),
        (
            "ViT-B-32",
            "it is a name of OpenCLIP's or timm's.* laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        ),
        ("ViT-B-32/laion2b_s34b_b79k", "it is a name of OpenCLIP's or timm's"),
        ("ViT-B/16", "it is a name of OpenCLIP's or timm's.* as openai/clip-vit-base-patch16 or"),
        ("ViT-L/14@336px", "as openai/clip-vit-large-patch14-336 or"),
        ("ViT-B-16/openai", "as openai/clip-vit-base-patch16 or"),
        ("RN50", "it is a name of OpenCLIP's or timm's"),
        ("ViT-B-32.pt", "nor a model's id .OWNER/NAME. on the Hugging Face Hub$"),
        ("RN50x4-quickgelu", "it is a name of OpenCLIP's or timm's"),
        ("vit_base_patch16_clip_224.openai", "it is a name of OpenCLIP's or timm's"),
        ("convnext_base_w", "it is a name of OpenCLIP's or timm's"),
    ],
)
def test_missing_paths_are_refused(path, message):
    with pytest.raises(FileNotFoundError, match=rf"is neither a local folder.*{message}") as caught:
        models.load(path)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def download(repo, name, revision=None):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=r"cannot be reached; give a folder$"):
        models.load("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "is a file, expected the checkpoint's folder; give {folder}$"),
        ("config.json", "is a file, expected the checkpoint's folder; give {folder}$"),
        ("ViT-B-32.pt", "`jaxtta convert {folder}/ViT-B-32.pt OUT`$"),
        ("pytorch_model.bin", "`jaxtta convert {folder}/pytorch_model.bin OUT`$"),
        ("clip.safetensors", "`jaxtta convert {folder}/clip.safetensors OUT` makes one"),
    ],
)
def test_a_file_in_place_of_a_folder(folder, name, message):
    (folder / name).touch()
    with pytest.raises(ValueError, match=message.format(folder=folder)):
        models.load(folder / name)


def test_configurations_in_other_forms_are_the_same(folder, tiny):
    """As transformers accepts them."""
    edit_config(vision_config__image_size=[32, 32], vision_config__patch_size=[8, 8])(folder)
    config = json.loads((folder / "config.json").read_text())
    end = config["text_config"]["eos_token_id"]
    edit_config(text_config__eos_token_id=[end])(folder)
    assert models.load(folder)[0] == dataclasses.replace(tiny[0], source=str(folder))
    for tower in ("text_config", "vision_config"):
        config[f"{tower}_dict"], config[tower] = config[tower], None
    (folder / "config.json").write_text(json.dumps(config))
    assert models.load(folder)[0] == dataclasses.replace(tiny[0], source=str(folder))


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(32, 32, (32, 32)),
        Preprocessing(32, 36, (32, 32), 2, (0.5,) * 3, (0.25,) * 3),
        Preprocessing(32, (32, 32), None),
        Preprocessing(32, (40, 36), (32, 32)),
        Preprocessing(32, None, (32, 32)),
    ],
)
def test_what_is_saved_is_read_with_the_same_pixels(tiny, tmp_path, preprocessing):
    """By transformers too, which refuses an empty size."""
    model = dataclasses.replace(tiny[0], preprocessing=preprocessing)
    (tmp_path / "processor_config.json").write_text("{}")  # of a model that was here before
    models.save(tmp_path, model, tiny[1])
    assert not (tmp_path / "processor_config.json").exists()
    assert models.load(tmp_path)[0].preprocessing == preprocessing
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for size in [(50, 41), (33, 64), (32, 32)]:
        ours = preprocessing(image(*size)).astype(float)
        assert np.abs(ours - theirs(settings, image(*size))).max() <= 1


def test_preprocessing_that_transformers_has_not(tiny, tmp_path, caplog):
    longer = Preprocessing(32, 32, (32, 32), resize_longer=True)
    with pytest.raises(ValueError, match=r"resize of the longer side cannot be saved"):
        models.save(tmp_path / "a", dataclasses.replace(tiny[0], preprocessing=longer), tiny[1])
    assert not (tmp_path / "a").exists()
    rounded = Preprocessing(32, 32, (32, 32), rounding="torchvision")
    models.save(tmp_path / "b", dataclasses.replace(tiny[0], preprocessing=rounded), tiny[1])
    assert "one pixel beside OpenCLIP's centre" in caplog.text


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
    assert {"model.safetensors", "processor_config.json"} <= {*asked}
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


def test_a_complete_copy_of_a_hub_model_loads_without_network(monkeypatch, folder, tmp_path):
    """As `hf download` leaves it: that optional files do not exist is not known."""
    import huggingface_hub

    cache = tmp_path / "cache" / "models--somebody--tiny-clip"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 32, "crop_size": 32}))
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(assets.MODEL / name, folder / name)
    shutil.copytree(folder, cache / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache.parent))
    model, _ = models.load("somebody/tiny-clip")
    assert models.zero_shot_task(model, ["cat", "dog"]).classes == 2


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "open_clip_pytorch_model.bin"])
def test_a_hub_model_of_pickles_alone_says_how_to_convert(monkeypatch, folder, pickled):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    (folder / "model.safetensors").rename(folder / pickled)
    if pickled.startswith("open_clip"):
        (folder / "config.json").rename(folder / "open_clip_config.json")

    def download(repo, name, revision=None):
        if (folder / name).exists():
            return str(folder / name)
        raise EntryNotFoundError.__new__(EntryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=r"`hf download a/b`, then `jaxtta convert FILE"):
        models.load("a/b")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "model.safetensors"])
def test_links_that_lead_nowhere_are_named(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/abc")
    with pytest.raises(FileNotFoundError, match=rf"{name}: is a link to ../../blobs/abc, which"):
        models.load(folder)


def test_a_path_that_is_none(tiny):
    with pytest.raises(TypeError, match=r"path_or_hub_id is \('ViT-B-32', 'openai'\), expected"):
        models.load(("ViT-B-32", "openai"))


def test_only_clip_is_saved(tmp_path, tiny):
    classifier = models.ImageClassifier(tiny[0].vision, ("a", "b"), tiny[0].preprocessing)
    with pytest.raises(TypeError, match="model is a ImageClassifier, only CLIP and SigLIP"):
        models.save(tmp_path, classifier, tiny[1])


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
