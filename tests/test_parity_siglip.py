"""SigLIP beside transformers' and open_clip's, on tiny random weights that they save.

`python tests/test_parity_siglip.py` wrote what `tests/test_siglip.py` compares with.
"""

import dataclasses
import functools
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GOLDEN, golden, relative
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file
from test_siglip import write_tokenizer

from jaxtta import models
from jaxtta.models.checkpoints import open_clip as reader
from jaxtta.models.transformer import ACTIVATIONS

pytestmark = pytest.mark.parity

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LENGTH = 16


@pytest.fixture
def open_clip():
    """OpenCLIP, where it is installed: `pip install open_clip_torch torchvision==0.28.0`."""
    return pytest.importorskip("open_clip")


def perturb(module):
    """Move what is zero or one at first: it would hide a mistake."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module.eval()


def inputs():
    rng = np.random.default_rng(0)
    images = rng.random((3, 32, 32, 3)).astype(np.float32)
    return images, rng.integers(0, 64, (5, LENGTH))


def check(folder, image_embeds, text_embeds, logits):
    """Embeddings, prompts and logits of the model in a folder, beside what it must give."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every parameter has its place
        model, params = models.load(folder)
    images, ids = inputs()
    pixels = jax.jit(model.normalize)(images)
    assert relative(jax.jit(model.encode_image)(params, pixels), image_embeds) < 1e-5
    assert relative(jax.jit(model.encode_text)(params, ids), text_embeds) < 1e-5
    prompts = model.prompts(models.task_from_token_ids(ids))
    classes = jax.jit(model.class_embeddings)(params, prompts)
    assert relative(classes, models.l2_normalize(text_embeds)) < 1e-5
    assert relative(jax.jit(model)(params, prompts, images).logits, logits) < 1e-5


def siglip_of_transformers(**changes):
    import torch
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    text = {"vocab_size": 64, "max_position_embeddings": LENGTH, "num_attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 8, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config=SIZES | text | changes, vision_config=SIZES | vision | changes
    )
    return perturb(SiglipModel(config))


def outputs_of_transformers(theirs, images, ids):
    """Image embeddings, text embeddings and logits for images in [0, 1]."""
    import torch

    pixels, ids = torch.tensor(((images - 0.5) / 0.5).transpose(0, 3, 1, 2)), torch.tensor(ids)
    with torch.no_grad():
        image = theirs.vision_model(pixels).pooler_output
        text = theirs.text_model(ids).pooler_output
        return image.numpy(), text.numpy(), theirs(ids, pixels).logits_per_image.numpy()


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}])
def test_embeddings_and_logits_equal_transformers(tmp_path, changes):
    theirs = siglip_of_transformers(**changes)
    theirs.save_pretrained(tmp_path)
    check(tmp_path, *outputs_of_transformers(theirs, *inputs()))


def test_the_golden_numbers_are_transformers():
    from transformers import SiglipModel

    theirs, expected = SiglipModel.from_pretrained(GOLDEN / "tiny-siglip"), golden("siglip")
    ours = outputs_of_transformers(theirs.eval(), expected["images"], expected["token_ids"])
    for name, value in zip(("image_embeds", "text_embeds", "logits"), ours, strict=True):
        assert relative(value, expected[name]) < 1e-5


def test_what_is_saved_is_read_by_transformers(tmp_path):
    import transformers

    model, params = models.load(GOLDEN / "tiny-siglip")
    models.save(tmp_path, model, params)
    theirs, expected = transformers.AutoModel.from_pretrained(tmp_path).eval(), golden("siglip")
    ours = outputs_of_transformers(theirs, expected["images"], expected["token_ids"])
    assert relative(ours[-1], expected["logits"]) < 1e-5
    image = Image.effect_mandelbrot((50, 70), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    kind = getattr(transformers, "SiglipImageProcessorPil", transformers.SiglipImageProcessor)
    processed = kind.from_pretrained(tmp_path)(image, return_tensors="np")
    pixels = model.normalize(model.preprocess([image])).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(processed["pixel_values"], pixels, atol=2 / 255 + 1e-6)


TIMM = {"base": "vit_base_patch16_siglip_224", "giantopt": "vit_giantopt_patch16_siglip_256"}
TEXT = {
    "context_length": LENGTH,
    "vocab_size": 64,
    "width": 32,
    "heads": 2,
    "layers": 2,
    "mlp_ratio": 1.5,
    "no_causal_mask": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "tokenizer_kwargs": {"clean": "canonicalize"},
}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ("base", {"proj_bias": True}),
        ("giantopt", {"proj_bias": True, "act_kwargs": {"approximate": "tanh"}}),
        ("base", {"proj_type": "none"}),
    ],
    ids=["SigLIP", "SigLIP 2", "no text projection"],
)
def test_embeddings_and_logits_equal_openclips(open_clip, tmp_path, monkeypatch, size, text):
    import timm
    import torch

    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    create = functools.partial(timm.create_model, TIMM[size], **small)
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(**settings))
    monkeypatch.setitem(reader.TIMM_SIZES, size, reader.TimmSize(32, 2, 2))
    vision = {
        "image_size": 32,
        "timm_model_name": f"vit_{size}_patch8_siglip_32",
        "timm_pool": "map",
        "timm_proj": "none",
    }
    settings = {"embed_dim": 32, "init_logit_bias": -10, "vision_cfg": vision}
    settings["text_cfg"] = TEXT | text
    theirs = perturb(open_clip.CustomTextCLIP(**settings))
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    config = {"model_cfg": settings | {"custom_text": True}, "preprocess_cfg": half}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    images, ids = inputs()
    pixels = torch.tensor(((images - 0.5) / 0.5).transpose(0, 3, 1, 2))
    with torch.no_grad():
        image, words = theirs.encode_image(pixels), theirs.encode_text(torch.tensor(ids))
        logits, _ = theirs.get_logits(pixels, torch.tensor(ids))
    check(tmp_path, image.numpy(), words.numpy(), logits.numpy())


def test_sizes_and_activations_are_timms(open_clip, tmp_path):
    import timm
    import torch

    names = [name for name in timm.list_models("vit_*_siglip_*") if reader._timm_siglip(name)]
    assert len(names) > 10
    for name in names:
        size = int(name.rsplit("_", 1)[1])
        section = {"image_size": size, "timm_model_name": name}
        section |= {"timm_pool": "map", "timm_proj": "none"}
        tower = reader._timm_tower(reader.ConfigSection(tmp_path, "", section), None, False)
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=0)
        ours = flatten_dict(
            jax.eval_shape(tower.init, jax.random.key(0), np.zeros((1, size, size, 3)))["params"]
        )
        count = sum(parameter.numel() for parameter in theirs.parameters())
        assert sum(np.prod(leaf.shape) for leaf in ours.values()) == count, name
        assert (tower.arch.layers, tower.arch.heads) == (
            len(theirs.blocks),
            theirs.blocks[0].attn.num_heads,
        )
        values = np.linspace(-3, 3, 50, dtype=np.float32)
        activated = theirs.blocks[0].mlp.act(torch.tensor(values)).numpy()
        np.testing.assert_allclose(
            ACTIVATIONS[tower.arch.activation](values), activated, atol=1e-5, err_msg=name
        )
        assert theirs.norm.eps == tower.arch.epsilon


def test_all_configurations_load_or_say_what_they_are(open_clip, tmp_path):
    """67 of the 144 of OpenCLIP 3.3, all of SigLIP among them."""
    loaded, refused = [], {}
    for path in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json")):
        config = tmp_path / "open_clip_config.json"
        config.write_text(json.dumps({"model_cfg": json.loads(path.read_text())}))
        try:
            reader.from_config(config)
            loaded.append(path.stem)
        except ValueError as error:
            refused[path.stem] = str(error)
    assert len(loaded) >= 67
    assert all(name in loaded for name in (*loaded, *refused) if "-SigLIP" in name)
    for name, message in refused.items():
        assert "not supported" in message or "expected" in message, name
    for name, kind in {
        "EVA02-L-14": "an EVA image tower",
        "coca_ViT-L-14": "a CoCa model",
        "convnext_base": "a ConvNeXt image tower",
        "MobileCLIP-S2": "a MobileCLIP image tower",
        "xlm-roberta-base-ViT-B-32": "a Hugging Face text tower",
    }.items():
        assert kind in refused[name]


NAMES = ["Cat's", "fire_truck", "Samoyed", "cafe & bar", "ice-cream", "CAT  cat"]
TEMPLATES = ["A photo of a {}.", "itap of my {}!"]


def prompts():
    return [template.replace("{}", name) for name in NAMES for template in TEMPLATES]


def test_tokens_equal_openclips(open_clip, tmp_path):
    write_tokenizer(tmp_path)
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": {}, "text_cfg": dict(TEXT)}}
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP2"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    expected = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(prompts()).numpy()
    model, _ = models.load(GOLDEN / "tiny-siglip")
    model = dataclasses.replace(model, source=str(tmp_path), clean="canonicalize")
    task = models.zero_shot_task(model, NAMES, TEMPLATES)
    np.testing.assert_array_equal(task.token_ids.reshape(-1, LENGTH), expected)


def test_tokens_equal_transformers(tmp_path):
    """SigLIP's own tokenizer, which leaves capitals and punctuation out by itself."""
    spm = pytest.importorskip("sentencepiece")
    from transformers import SiglipTokenizer

    text = tmp_path / "text"
    text.write_text("\n".join(prompts()))
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    settings = {"input": str(text), "model_prefix": str(tmp_path / "spiece"), "minloglevel": 2}
    spm.SentencePieceTrainer.train(**settings, **ids, vocab_size=60, hard_vocab_limit=False)
    tokenizer = SiglipTokenizer(str(tmp_path / "spiece.model"))
    tokenizer.save_pretrained(tmp_path)
    names = [prompt.replace("_", " ") for prompt in prompts()]
    expected = tokenizer(names, padding="max_length", max_length=64)["input_ids"]
    model, _ = models.load(GOLDEN / "tiny-siglip")
    text_tower = model.text.clone(max_length=64)
    model = dataclasses.replace(model, source=str(tmp_path), text=text_tower)
    task = models.zero_shot_task(model, NAMES, TEMPLATES)
    np.testing.assert_array_equal(task.token_ids.reshape(-1, 64), expected)


def write_golden():
    """Write `golden/tiny-siglip` and `golden/siglip.npz`."""
    theirs, (images, ids) = siglip_of_transformers(), inputs()
    theirs.save_pretrained(GOLDEN / "tiny-siglip")
    names = ("images", "token_ids", "image_embeds", "text_embeds", "logits")
    values = (images, ids, *outputs_of_transformers(theirs, images, ids))
    np.savez_compressed(GOLDEN / "siglip.npz", **dict(zip(names, values, strict=True)))


if __name__ == "__main__":
    write_golden()
