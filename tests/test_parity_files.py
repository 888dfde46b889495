"""Checkpoints as transformers saves them, of the version that is installed: pixels and logits."""

import jax
import numpy as np
import pytest
from conftest import GOLDEN, golden, relative
from test_preprocess import image, published

from jaxtta import assets, models

pytestmark = pytest.mark.parity

IMAGES = [image(50, 41), image(33, 64, 1), image(32, 32, 2), image(97, 30, 3)]
NAMES = ["cat", "Levi's jeans", "dog"]
SQUARE = {"height": 32, "width": 32}
PROCESSORS = [
    {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
    {"size": 37, "crop_size": 32, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
    {"size": SQUARE, "do_center_crop": False},
    {"size": [36, 40], "crop_size": [32, 32], "do_normalize": False},
]


@pytest.fixture(scope="module")
def theirs():
    """A tiny CLIP of transformers with random weights, far from where they start."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 32, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    text = {"hidden_size": 24, "vocab_size": 858, "max_position_embeddings": 32} | {
        "eos_token_id": 857,
        "bos_token_id": 856,
        "pad_token_id": 857,
        "projection_dim": 16,
    }
    config = CLIPConfig(vision_config=tower | vision, text_config=tower | text, projection_dim=16)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def compare(folder):
    """Pixels, embeddings and logits of a folder in jaxtta and in transformers."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    reference = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    pixels = processor(IMAGES, return_tensors="pt")["pixel_values"]
    model, params = models.load(folder)
    ours = model.preprocess(IMAGES)
    std = np.array(model.preprocessing.std) * 255
    apart = np.asarray(model.normalize(ours)) - np.moveaxis(pixels.numpy(), 1, -1)
    assert np.abs(apart * std).max() <= 1.01  # grey levels

    prompts = [f"a photo of a {name}." for name in NAMES]
    ids = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = reference(pixel_values=pixels, **ids)
    task = models.zero_shot_task(model, NAMES)
    texts = jax.jit(model.class_embeddings)(params, model.prompts(task))
    assert relative(texts, out.text_embeds.numpy()) < 1e-5
    own = np.moveaxis(pixels.numpy(), 1, -1)
    embeddings = jax.jit(model.encode_image)(params, own)
    embeddings = models.l2_normalize(embeddings)
    assert relative(embeddings, out.image_embeds.numpy()) < 1e-5
    logits = jax.jit(model)(params, model.prompts(task), ours).logits
    assert relative(logits, out.logits_per_image.numpy()) < 1e-2  # pixels differ by a grey level
    return model


@pytest.mark.parametrize("settings", PROCESSORS)
def test_a_saved_processor(theirs, tmp_path, settings):
    """transformers 5 writes processor_config.json, 4 preprocessor_config.json."""
    import transformers
    from transformers import AutoTokenizer, CLIPProcessor

    theirs.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(assets.MODEL)
    CLIPProcessor(published(settings), tokenizer).save_pretrained(tmp_path)
    model = compare(tmp_path)
    name = "processor" if transformers.__version__.startswith("5") else "preprocessor"
    assert model.preprocessing_origin == str(tmp_path / f"{name}_config.json")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shard", ["1GB", "30KB"])
def test_half_precision_single_and_sharded(theirs, tmp_path, dtype, shard):
    import copy

    import torch
    from transformers import AutoTokenizer

    half = copy.deepcopy(theirs).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "30KB")
    AutoTokenizer.from_pretrained(assets.MODEL).save_pretrained(tmp_path)
    published(PROCESSORS[0]).save_pretrained(tmp_path)
    compare(tmp_path)


@pytest.mark.parametrize(
    "preprocessing",
    [
        models.Preprocessing(32, 32, (32, 32)),
        models.Preprocessing(32, 37, (32, 32), 2, (0.5,) * 3, (0.25,) * 3),
        models.Preprocessing(32, (32, 32), None),
        models.Preprocessing(32, (40, 36), (32, 32)),
    ],
)
def test_what_jaxtta_saves_is_read_by_transformers(embedded, tmp_path, preprocessing):
    import dataclasses

    model, params = embedded
    models.save(tmp_path, dataclasses.replace(model, preprocessing=preprocessing), params)
    assert compare(tmp_path).preprocessing == preprocessing


@pytest.mark.parametrize("name", ["openclip-vit", "openclip-vit-quickgelu"])
def test_open_clips_models_are_saved_for_transformers(tmp_path, name):
    """The end of text is the highest id there, heads are given by their width."""
    import torch
    from transformers import CLIPModel

    model, params = models.load(GOLDEN / name)
    models.save(tmp_path, model, params)
    expected = golden(name.replace("-", "_"))
    reference = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        out = reference(
            pixel_values=torch.tensor(expected["images"].transpose(0, 3, 1, 2)),  # normalised
            input_ids=torch.tensor(expected["token_ids"]).long(),
        )
    for ours, key in ((out.image_embeds, "image_embeds"), (out.text_embeds, "text_embeds")):
        unit = expected[key] / np.linalg.norm(expected[key], axis=-1, keepdims=True)
        assert relative(ours.numpy(), unit) < 1e-5
