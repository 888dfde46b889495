"""SigLIP: golden numbers, prompts with their padding, tokens, and every method on it."""

import dataclasses
import json
import shutil
import warnings
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, golden, relative, size_of
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jaxtta import adapters, continual, models, tree
from jaxtta.models import prompts as packing
from jaxtta.models import task as tasks
from jaxtta.models.checkpoints import open_clip as reader

FOLDER = GOLDEN / "tiny-siglip"


@pytest.fixture(scope="module")
def reference():
    return golden("siglip")


@pytest.fixture(scope="module")
def task(reference):
    return models.task_from_token_ids(reference["token_ids"])


def check(model, params, reference, agrees):
    """Embeddings, packed prompts and logits of the golden weights."""
    pixels = model.normalize(reference["images"])
    images = jax.jit(model.encode_image)(params, pixels)
    agrees("SigLIP", "image embeddings", images, reference["image_embeds"], norm=1e-5)
    text = jax.jit(model.encode_text)(params, reference["token_ids"])
    agrees("SigLIP", "text embeddings", text, reference["text_embeds"], norm=1e-5)
    prompts = model.prompts(models.task_from_token_ids(reference["token_ids"]))
    logits = jax.jit(model)(params, prompts, reference["images"]).logits
    agrees("SigLIP", "logits", logits, reference["logits"], norm=1e-5)


def test_embeddings_and_logits_equal_transformers(reference, agrees):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every parameter has its place
        model, params = models.load(FOLDER)
    check(model, params, reference, agrees)
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params)
    assert model.preprocessing == models.preprocess.Preprocessing(
        32, (32, 32), None, 3, (0.5,) * 3, (0.5,) * 3
    )


# OpenCLIP's folders, written here with the golden weights under its names.

TEXT = {
    "context_length": 16,
    "vocab_size": 64,
    "width": 32,
    "heads": 2,
    "layers": 2,
    "mlp_ratio": 1.5,
    "hf_tokenizer_name": "timm/ViT-gopt-16-SigLIP2-256",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
VISION = {
    "image_size": 32,
    "timm_model_name": "vit_giantopt_patch8_siglip_32",
    "timm_model_pretrained": False,
    "timm_pool": "map",
    "timm_proj": "none",
}


def joint(tensors, layer, parts, leaf):
    return np.concatenate([tensors[f"{layer}.{part}_proj.{leaf}"] for part in parts])


def open_clip_tensors(theirs):
    """The golden weights as OpenCLIP names and arranges them."""
    ours = {"logit_scale": theirs["logit_scale"][0], "logit_bias": theirs["logit_bias"][0]}
    for leaf in ("weight", "bias"):
        for number in range(2):
            for block, old, names in (
                (
                    f"text.transformer.resblocks.{number}",
                    f"text_model.encoder.layers.{number}",
                    ("ln_1", "ln_2", "attn.in_proj_", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"),
                ),
                (
                    f"visual.trunk.blocks.{number}",
                    f"vision_model.encoder.layers.{number}",
                    ("norm1", "norm2", "attn.qkv.", "attn.proj", "mlp.fc1", "mlp.fc2"),
                ),
            ):
                first, second, qkv, out, fc1, fc2 = names
                ours |= {
                    f"{block}.{first}.{leaf}": theirs[f"{old}.layer_norm1.{leaf}"],
                    f"{block}.{second}.{leaf}": theirs[f"{old}.layer_norm2.{leaf}"],
                    f"{block}.{qkv}{leaf}": joint(theirs, f"{old}.self_attn", "qkv", leaf),
                    f"{block}.{out}.{leaf}": theirs[f"{old}.self_attn.out_proj.{leaf}"],
                    f"{block}.{fc1}.{leaf}": theirs[f"{old}.mlp.fc1.{leaf}"],
                    f"{block}.{fc2}.{leaf}": theirs[f"{old}.mlp.fc2.{leaf}"],
                }
        pool, head = "visual.trunk.attn_pool", "vision_model.head"
        query, *rest = np.split(theirs[f"{head}.attention.in_proj_{leaf}"], 3)
        ours |= {
            f"{pool}.q.{leaf}": query,
            f"{pool}.kv.{leaf}": np.concatenate(rest),
            f"{pool}.proj.{leaf}": theirs[f"{head}.attention.out_proj.{leaf}"],
            f"{pool}.norm.{leaf}": theirs[f"{head}.layernorm.{leaf}"],
            f"{pool}.mlp.fc1.{leaf}": theirs[f"{head}.mlp.fc1.{leaf}"],
            f"{pool}.mlp.fc2.{leaf}": theirs[f"{head}.mlp.fc2.{leaf}"],
            f"visual.trunk.norm.{leaf}": theirs[f"vision_model.post_layernorm.{leaf}"],
            f"text.ln_final.{leaf}": theirs[f"text_model.final_layer_norm.{leaf}"],
            f"text.text_projection.{leaf}": theirs[f"text_model.head.{leaf}"],
            f"visual.trunk.patch_embed.proj.{leaf}": theirs[
                f"vision_model.embeddings.patch_embedding.{leaf}"
            ],
        }
    text, vision = "text_model.embeddings", "vision_model.embeddings"
    return ours | {
        "visual.trunk.attn_pool.latent": theirs["vision_model.head.probe"],
        "visual.trunk.pos_embed": theirs[f"{vision}.position_embedding.weight"][None],
        "text.token_embedding.weight": theirs[f"{text}.token_embedding.weight"],
        "text.positional_embedding": theirs[f"{text}.position_embedding.weight"],
    }


@pytest.fixture
def open_clip_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(reader.TIMM_SIZES, "giantopt", reader.TimmSize(32, 2, 4, 1.5))
    config = {"embed_dim": 32, "init_logit_bias": -10, "custom_text": True}
    config |= {"vision_cfg": VISION, "text_cfg": TEXT}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    write_config(tmp_path, {"model_cfg": config, "preprocess_cfg": half})
    tensors = open_clip_tensors(load_file(FOLDER / "model.safetensors"))
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        tmp_path / "open_clip_model.safetensors",
    )
    return tmp_path


def write_config(folder, config):
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def test_openclips_folder_gives_the_same_model(open_clip_folder, siglip, reference, agrees):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, params = models.load(open_clip_folder)
    own, expected = siglip
    assert model.clean == "canonicalize"
    assert model == dataclasses.replace(own, source=str(open_clip_folder), clean=model.clean)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))
    check(model, params, reference, agrees)


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        ("vision_cfg", {"timm_pool": "avg"}, "vision_cfg.timm_pool is 'avg', expected 'map'"),
        ("vision_cfg", {"timm_pool": None}, "vision_cfg.timm_pool is None, expected 'map'"),
        ("vision_cfg", {"timm_proj": "linear"}, "timm_proj is 'linear', expected 'none'"),
        ("vision_cfg", {"image_size": 64}, "image_size is 64, expected the 32 of vit_giantopt"),
        ("vision_cfg", {"layers": 3}, "vision_cfg.layers is 3, which is not supported"),
        (
            "vision_cfg",
            {"timm_model_name": "vit_base_patch16_siglip_gap_224"},
            "another timm image tower .vit_base_patch16_siglip_gap_224., which is not supported",
        ),
        ("text_cfg", {"pool_type": "first"}, "pool_type is 'first', expected 'last'"),
        ("text_cfg", {"vocab_size": 60}, r"has shape \(64, 32\), expected \(60, 32\)"),
        ("text_cfg", {"proj_bias": False}, "not used: text_projection/bias"),
    ],
)
def test_other_settings_of_openclips_are_refused(open_clip_folder, place, changes, message):
    config = json.loads((open_clip_folder / "open_clip_config.json").read_text())
    config["model_cfg"][place] |= changes
    write_config(open_clip_folder, config)
    with warnings.catch_warnings(), pytest.raises((ValueError, UserWarning), match=message):
        warnings.simplefilter("error")
        models.load(open_clip_folder)


def edit_config(section=None, **changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (config[section] if section else config).update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            edit_config(model_type="siglip2"),
            "SigLIP 2 for images of any shape; .* clip, siglip, vit",
        ),
        (edit_config(model_type="align"), "model_type is 'align', supported are clip, siglip, vit"),
        (edit_config("vision_config", vision_use_head=False), "vision_use_head is false, expected"),
        (edit_config("text_config", projection_size=16), "size is 16, expected the image tower's"),
        (edit_config("vision_config", hidden_act="mish"), "vision_config.hidden_act is 'mish'"),
        (edit_config("text_config", num_attention_heads=5), "text_config: 5 heads do not divide"),
    ],
)
def test_other_models_of_transformers_are_refused(tmp_path, spoil, message):
    folder = shutil.copytree(FOLDER, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(folder)
    assert "\n" not in str(caught.value)


def test_a_saved_model_is_the_same(siglip, tmp_path):
    model, params = siglip
    models.save(tmp_path, model, params)
    again, loaded = models.load(tmp_path)
    assert again == dataclasses.replace(model, source=str(tmp_path))
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))
    ours, theirs = (load_file(x / "model.safetensors") for x in (tmp_path, FOLDER))
    assert {name: x.shape for name, x in ours.items()} == {n: x.shape for n, x in theirs.items()}


def test_prompts_that_transformers_does_not_clean_are_said(siglip, tmp_path, caplog):
    model, params = siglip
    models.save(tmp_path, dataclasses.replace(model, clean="canonicalize"), params)
    assert "prompts (canonicalize) before they are tokenised" in caplog.text
    assert models.load(tmp_path)[0].clean == "siglip"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": False}, "new: a model between CLIP and SigLIP .* cannot be saved"),
        ({"text": {"has_projection": False}}, "new: a text tower without projection cannot be"),
        ({"text": {"projection_bias": False}}, "new: a model between CLIP and SigLIP .* cannot"),
    ],
)
def test_what_transformers_has_not_is_not_saved(siglip, tmp_path, changes, message):
    model, params = siglip
    if "text" in changes:
        changes = {"text": model.text.clone(**changes["text"])}
    with pytest.raises(ValueError, match=message):
        models.save(tmp_path / "new", dataclasses.replace(model, **changes), params)
    assert not (tmp_path / "new").exists()


# Prompts.


def test_prompts_are_read_with_their_padding(siglip, task):
    """Every token of a row counts, the last as much as the first, and rows do not mix."""
    model, params = siglip
    embed = jax.jit(model.class_embeddings)
    before = embed(params, model.prompts(task))
    for place in (0, 9, 15):
        ids = task.token_ids.copy()
        ids[1, 0, place] = (ids[1, 0, place] + 1) % 64
        after = embed(params, model.prompts(models.task_from_token_ids(ids)))
        moved = np.abs(after - before).max(-1)
        assert moved[1] > 1e-3
        np.testing.assert_allclose(np.delete(moved, 1), 0, atol=1e-6)


def test_templates_are_averaged(siglip, reference):
    model, params = siglip
    ids = np.random.default_rng(1).integers(0, 64, (4, 3, 16))
    prompts = model.prompts(models.task_from_token_ids(ids))
    text = models.l2_normalize(jax.jit(model.encode_text)(params, ids.reshape(12, 16)))
    expected = models.l2_normalize(text.reshape(4, 3, -1).mean(1))
    np.testing.assert_allclose(
        jax.jit(model.class_embeddings)(params, prompts), expected, atol=1e-5
    )


def test_tokens_of_imagenets_prompts():
    """The figure of the README."""
    prompts = packing.whole(models.task_from_token_ids(np.zeros((1000, 64), int)))
    assert len(prompts.prefix) + len(prompts.tokens) == 64_000


def test_prompts_of_another_length_are_refused(siglip, task):
    with pytest.raises(ValueError, match=r"have 9 tokens, .* needs them filled up to 16"):
        siglip[0].prompts(models.task_from_token_ids(task.token_ids[..., :9]))


WORDS = ["a", "photo", "of", "cat", "fire", "truck", ".", "A", "Cat", "'", "s"]


def write_tokenizer(folder, **settings):
    """A tokenizer of words that knows capitals and punctuation, and ends prompts with 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    words = Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(names)}, "<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A <eos>", None, [("<eos>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special, **settings).save_pretrained(folder)


@pytest.mark.parametrize(
    ("clean", "side", "words"),
    [
        ("lower", "right", ["a", "photo", "of", "a", "cat", "'", "s", "."]),  # transformers
        ("lower", "left", ["a", "photo", "of", "a", "cat", "'", "s", "."]),
        ("canonicalize", "right", ["a", "photo", "of", "a", "<unk>"]),  # OpenCLIP: "cats"
    ],
)
def test_tokens_of_prompts(siglip, tmp_path, clean, side, words):
    """Lower case, with punctuation or without, and filled up to the model's length."""
    write_tokenizer(tmp_path, padding_side=side)
    model = dataclasses.replace(siglip[0], source=str(tmp_path), clean=clean)
    task = models.zero_shot_task(model, ["Cat's", "fire_truck"], ["A photo of a {}."])
    ids = [2 if word == "<unk>" else 3 + WORDS.index(word) for word in words] + [1]
    padding = [0] * (16 - len(ids))
    assert task.token_ids[0, 0].tolist() == (padding + ids if side == "left" else ids + padding)
    assert model.prompts(task).ends.tolist() == [[15], [31]]
    assert task.class_names == ("Cat's", "fire truck")


def test_prompts_that_are_too_long_are_refused(siglip, tmp_path):
    write_tokenizer(tmp_path)
    model = dataclasses.replace(siglip[0], source=str(tmp_path))
    with pytest.raises(ValueError, match="a prompt has 17 tokens, the model takes at most 16"):
        models.zero_shot_task(model, ["cat", "cat " * 16], ["{}"])


def test_a_tokenizer_without_padding_is_refused(siglip, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    model = dataclasses.replace(siglip[0], source=str(tmp_path))
    with pytest.raises(ValueError, match="its tokenizer has no padding token"):
        models.zero_shot_task(model, ["cat", "fire truck"])


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_missing_package_is_named(siglip, tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    model = dataclasses.replace(siglip[0], source=str(tmp_path))
    with pytest.raises(ValueError, match=r"a package that is not installed .* sentencepiece"):
        models.zero_shot_task(model, ["cat", "dog"])


def test_canonical_text():
    assert tasks.canonicalize("  A Photo_of  {}, isn't it?\n") == "a photo of isnt it"
    assert tasks.canonicalize("Ünïcode – stays") == "ünïcode – stays"


# Adapters.


def test_zero_shot_is_the_models_own_whatever_its_bias(siglip, reference, task):
    model, params = siglip
    adapter = adapters.zero_shot(model, task)
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), reference["images"])
    np.testing.assert_allclose(prediction.logits, reference["logits"], rtol=1e-5, atol=1e-5)
    other = params | {"logit_bias": params["logit_bias"] + 3}
    _, shifted = jax.jit(adapter.step)(other, adapter.init(other), reference["images"])
    np.testing.assert_allclose(shifted.logits, prediction.logits + 3, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.nn.softmax(shifted.logits), jax.nn.softmax(prediction.logits), atol=1e-5
    )


def test_what_counts_as_normalisation(siglip):
    """Every LayerNorm of both towers and of the pooling, and nothing else."""
    _, params = siglip
    chosen = {
        tower: set(flatten_dict(tree.partition(params, predicate)[0], sep="/"))
        for tower in ("image", "text")
        for predicate in [tree.normalisation_parameters(tower)]
    }
    blocks = [f"encoder/layers/{n}/layer_norm{k}" for n in range(2) for k in (1, 2)]
    layers = {
        "image": [f"vision_model/{x}" for x in (*blocks, "post_layernorm", "head/layernorm")],
        "text": [f"text_model/{x}" for x in (*blocks, "final_layer_norm")],
    }
    for tower, names in layers.items():
        assert chosen[tower] == {f"{name}/{leaf}" for name in names for leaf in ("scale", "bias")}


def moved(method, siglip, images, task):
    """The paths that a step of a method changes, and its prediction."""
    model, params = siglip
    adapter = method(model, task, optimizer=optax.sgd(1e-2))
    state = adapter.init(params)
    after, prediction = jax.jit(adapter.step)(params, state, images)
    assert not prediction.metrics["skipped"]
    start, end = (flatten_dict(x.adapted, sep="/") for x in (state, after))
    return {name for name in start if np.any(start[name] != end[name])}, prediction


def test_tent_moves_the_image_tower(siglip, reference, task):
    names, prediction = moved(adapters.tent, siglip, reference["images"], task)
    chosen, _ = tree.partition(siglip[1], tree.normalisation_parameters("image"))
    assert names == set(flatten_dict(chosen, sep="/"))
    np.testing.assert_allclose(prediction.logits, reference["logits"], rtol=1e-4, atol=1e-4)


def test_batclip_moves_both_towers(siglip, reference, task):
    names, prediction = moved(adapters.batclip, siglip, reference["images"], task)
    chosen, _ = tree.partition(siglip[1], tree.normalisation_parameters("both"))
    assert names == set(flatten_dict(chosen, sep="/"))
    np.testing.assert_allclose(prediction.logits, reference["logits"], rtol=1e-4, atol=1e-4)


def test_tent_lowers_entropy(siglip, reference, task):
    model, params = siglip
    adapter = adapters.tent(model, task, optimizer=optax.sgd(1e-1))
    state, step, entropies = adapter.init(params), jax.jit(adapter.step), []
    for _ in range(5):
        state, prediction = step(params, state, reference["images"])
        entropies.append(float(prediction.metrics["entropy"]))
    assert entropies[-1] < entropies[0]


def test_tnt_runs(siglip, reference, task):
    model, params = siglip
    config = adapters.TNTConfig(views=4, select_fraction=0.5)
    adapter = adapters.tnt(model, task, config=config)
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), reference["images"][:2])
    np.testing.assert_allclose(np.exp(prediction.logits).sum(-1), 1, atol=1e-4)
    assert prediction.metrics["loss"] != 0


def test_methods_that_need_a_class_token_say_so(siglip, reference):
    model, params = siglip
    assert model.feature_shape is None
    with pytest.raises(ValueError, match=r"no layer features .*SigLIP"):
        models.feature_statistics(model, params, [reference["images"]])
    with pytest.raises(ValueError, match="GNSP needs CLIP with a vision transformer, not SigLIP"):
        continual.task_grams(model, params, [reference["images"]])


def test_bfloat16_stays_close(siglip, reference, task):
    model, params = models.load(FOLDER, compute_dtype=jnp.bfloat16)
    out = jax.jit(model)(params, model.prompts(task), reference["images"])
    assert {out.logits.dtype, out.embeddings.dtype} == {jnp.dtype("float32")}
    assert 1e-6 < relative(out.embeddings, reference["image_embeds"]) < 3e-2
    half, _ = models.load(FOLDER, dtype=jnp.bfloat16)
    assert half == model


def test_sizes_of_a_published_model():
    """SigLIP's base model has 203 million parameters, as its authors count them."""
    from transformers import SiglipConfig

    model = models.siglip_from_config(SiglipConfig())
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert size_of(shapes) == 203_155_970
