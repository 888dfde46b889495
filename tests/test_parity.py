"""Comparisons with transformers' PyTorch CLIP, and with the reference accuracies."""

import re
import zipfile

import jax
import numpy as np
import pytest
from conftest import relative

from jaxtta import data, evaluate, models

pytestmark = pytest.mark.parity

SIZES = {
    "ViT-B/16": {
        "vision": {"patch_size": 16},
        "text": {},
        "projection": 512,
    },
    "ViT-L/14": {
        "vision": {
            "patch_size": 14,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "projection": 768,
    },
}


@pytest.mark.parametrize("size", SIZES)
def test_full_size_embeddings_equal_transformers(tmp_path, size):
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    settings = SIZES[size]
    theirs = CLIPModel(
        CLIPConfig(
            vision_config={**settings["vision"], "projection_dim": settings["projection"]},
            text_config={**settings["text"], "projection_dim": settings["projection"]},
            projection_dim=settings["projection"],
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 224, 224, 3)).astype(np.float32)
    ids = rng.integers(0, 49000, (4, 77))
    ids[:, 0] = 49406
    ids = np.where(np.arange(77) >= np.array([[9], [12], [5], [76]]), 49407, ids)

    def embeddings(output):  # transformers 5 wraps them
        return getattr(output, "pooler_output", output).numpy()

    with torch.no_grad():
        images = embeddings(theirs.get_image_features(torch.tensor(pixels.transpose(0, 3, 1, 2))))
        texts = embeddings(theirs.get_text_features(torch.tensor(ids)))
    assert relative(jax.jit(model.encode_image)(params, pixels), images) < 1e-4
    assert relative(jax.jit(model.encode_text)(params, ids), texts) < 1e-4
    packed = jax.jit(model.class_embeddings)(params, model.prompts(models.task_from_token_ids(ids)))
    assert relative(packed, texts / np.linalg.norm(texts, axis=-1, keepdims=True)) < 1e-4


@pytest.mark.parametrize("size", ["tiny", "ViT-B/16"])
def test_a_supervised_classifier_equals_transformers(tmp_path, size):
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3} | {
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = ViTConfig(num_labels=7, **(tiny if size == "tiny" else {}))
    theirs = ViTForImageClassification(config).eval()
    with torch.no_grad():  # what is zero or one at first would hide a mistake
        for parameter in theirs.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    side = config.image_size
    images = np.random.default_rng(0).random((3, side, side, 3)).astype(np.float32)
    pixels = torch.tensor(((images - 0.5) / 0.5).transpose(0, 3, 1, 2))
    with torch.no_grad():
        out = theirs(pixels, output_hidden_states=True)
    ours = jax.jit(model)(params, (), images)
    assert relative(ours.logits, out.logits.numpy()) < 1e-5
    last = theirs.vit.layernorm(out.hidden_states[-1])[:, 0].detach().numpy()
    assert relative(ours.layer_features[:, -1], last) < 1e-5
    assert len(model.class_names) == 7


def reference_accuracies(readme):
    """{corruption: (zero-shot, BATCLIP 1e-3)} from the table in the weights' README."""
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \|(?: [\d.]+ \|){2} ([\d.]+) \|", readme, re.M)
    return {name: (float(zero), float(batclip)) for name, zero, batclip in rows}


def test_accuracies_equal_the_reference(shared, tmp_path):
    """All 2,000 images under every corruption, as the reference was run."""
    expected = reference_accuracies((shared / "weights/README.md").read_text())
    assert len(expected) == 16
    with zipfile.ZipFile(shared / "data/cifar10-c-severity5.zip") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "cifar10-c-severity5/test"
    model, params = models.load(shared / "weights/tiny-clip-cifar10")
    names = data.CIFAR10_CLASSES
    benchmark = data.open_benchmark("arrays", folder, model.preprocessing, names)
    streams = data.make_streams(
        "reset_each_shift", tuple(expected), (0,), data.labels_of(benchmark), order="stored"
    )
    spec = evaluate.Spec(benchmark, streams, models.zero_shot_task(model, names), 100)
    named = {"zero_shot": "zero_shot", "batclip": "batclip:lr=1e-3"}
    results = evaluate.sweep(spec, [*named.values()], model, params, progress=False)
    top1 = {(result.adapter, result.stream): 100 * result.top1.mean() for result in results}
    ours = {(name, text): top1[named[name], text] for name in named for text in expected}
    print(ours)
    for corruption, (zero_shot, _) in expected.items():
        assert ours["zero_shot", corruption] == pytest.approx(zero_shot, abs=0.3), corruption
    common = [name for name in expected if name != "clean"]
    mean = np.mean([ours["batclip", name] for name in common])
    assert mean == pytest.approx(np.mean([expected[name][1] for name in common]), abs=1.0)
