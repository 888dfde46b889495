import dataclasses
import functools
import json
import shutil
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, golden, relative

import jaxtta
from jaxtta.flops import count_flops
from jaxtta.models import l2_normalize, prompts, task_from_token_ids, zero_shot_task
from jaxtta.models.attention import attention
from jaxtta.models.transformer import layer_norm


@pytest.fixture(scope="module")
def forward():
    return golden("clip_forward")


def test_image_tower_equals_the_published_one(tiny, forward, agrees):
    model, params = tiny
    features = jax.jit(lambda p, x: model.image_features(p, x, all_tokens=True))(
        params, forward["images"]
    )
    hidden = np.stack(features.hidden_states)
    agrees("CLIP", "image embeddings", features.embeddings, forward["image_embeds"], norm=1e-5)
    agrees("CLIP", "pooled image features", features.pooled, forward["vision_pooled"], norm=1e-5)
    agrees("CLIP", "hidden states", hidden, forward["vision_hidden_states"], norm=1e-5)


def test_last_block_is_the_same_for_the_class_token_alone(tiny, forward):
    model, params = tiny
    some, whole = (
        jax.jit(lambda p, x, a=a: model.image_features(p, x, all_tokens=a))(
            params, forward["images"]
        )
        for a in (False, True)
    )
    np.testing.assert_allclose(some.embeddings, whole.embeddings, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(some.layer_features, whole.layer_features, rtol=1e-5, atol=1e-5)
    assert some.hidden_states[-1].shape[1] == 1


def test_layer_features_are_class_tokens_through_the_next_norm(tiny, forward):
    model, params = tiny
    features = jax.jit(model.image_features)(params, forward["images"])
    assert features.layer_features.shape == (5, 3, 32)
    norm = params["vision_model"]["encoder"]["layers"]["1"]["layer_norm1"]
    token = np.asarray(features.hidden_states[1][:, 0], np.float64)
    token = (token - token.mean(-1, keepdims=True)) / np.sqrt(token.var(-1, keepdims=True) + 1e-5)
    expected = token * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
    np.testing.assert_allclose(features.layer_features[:, 0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(features.layer_features[:, -1], features.pooled)


def test_text_tower_equals_the_published_one(tiny, forward, agrees):
    model, params = tiny
    embeddings = jax.jit(model.encode_text)(params, forward["token_ids"])
    agrees("CLIP", "text embeddings", embeddings, forward["text_embeds"], norm=1e-5)


@hypothesis.settings(max_examples=3)  # every shape compiles anew
@hypothesis.given(st.data())
def test_packing_prompts_changes_no_logit(tiny, data):
    """Whole, cut and packed prompts agree, whatever they share and however long they are."""
    model, params = tiny
    count, templates = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shared = data.draw(st.integers(0, 8))
    ids = np.full((count, templates, 16), 63)
    ids[..., 0] = 62
    ids[..., 1:15] = rng.integers(0, 62, (count, templates, 14))
    ids[..., 1 : 1 + shared] = ids[0, 0, 1 : 1 + shared]
    lengths = rng.integers(shared + 1, 16, (count, templates))
    ids = np.where(np.arange(16) >= lengths[..., None], 63, ids)
    image = l2_normalize(jnp.asarray(rng.normal(size=(4, 16)), jnp.float32))
    scale = np.exp(params["logit_scale"])

    def logits(classes):
        return scale * image @ classes.T

    @jax.jit
    def averaged(ids, params=params):
        embeddings = l2_normalize(model.encode_text(params, ids.reshape(count * templates, -1)))
        return l2_normalize(embeddings.reshape(count, templates, -1).mean(1))

    whole = logits(averaged(ids))
    cut = logits(averaged(ids[..., : lengths.max() + 1]))
    embed = jax.jit(model.class_embeddings)
    packing = model.prompts(task_from_token_ids(ids))
    packed = logits(embed(params, packing))
    np.testing.assert_allclose(cut, whole, atol=1e-5 * scale)
    np.testing.assert_allclose(packed, whole, atol=1e-5 * scale)

    weights = rng.normal(size=(count, 16))
    plain, ours = (
        jax.tree.leaves(
            jax.jit(jax.grad(lambda p, embed=embed: (embed(p) * weights).sum()))(params)
        )
        for embed in (lambda p: averaged(ids, p), lambda p: model.class_embeddings(p, packing))
    )
    for expected, found in zip(plain, ours, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, abs(expected).max()))


def test_prompts_may_be_mapped_over(tiny):
    """Several tasks with as many tokens, whose prompts end elsewhere."""
    model, params = tiny
    tasks = []
    for lengths in ([4, 6, 2, 3], [2, 4, 3, 6], [6, 3, 4, 2]):
        ids = np.random.default_rng(0).integers(2, 60, (4, 16))
        ids[:, 0], ids[np.arange(16) >= np.array(lengths)[:, None]] = 1, 63
        tasks.append(model.prompts(task_from_token_ids(ids)))
    weights = np.random.default_rng(1).normal(size=(4, 16))

    @jax.value_and_grad
    def score(params, packing):
        return (model.class_embeddings(params, packing) * weights).sum()

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *tasks)
    mapped = jax.jit(jax.vmap(score, (None, 0)))(params, stacked)
    one = jax.jit(score)
    alone = jax.tree.map(lambda *leaves: np.stack(leaves), *(one(params, task) for task in tasks))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), mapped, alone)


@pytest.mark.parametrize("length", [1, 3])
def test_derivatives_of_rows_are_those_of_indexing(length):
    """Also of second order, over streams, and of one class with one token."""
    lengths = np.minimum([length, 1, 2], length)
    valid = np.arange(length) < lengths[:, None]
    rows = int(valid.sum())
    grid = np.full(valid.shape, rows)
    grid[valid] = np.arange(rows)
    cells = np.flatnonzero(valid)
    x = jax.random.normal(jax.random.key(0), (2, rows, 4))

    def score(take, x):
        def inner(x):
            return (jnp.sin(take(x)) ** 3).sum()

        return inner(x) + (jnp.cos(jax.grad(inner)(x)) * jnp.arange(x.size).reshape(x.shape)).sum()

    def indexed(x):
        return jnp.where(valid[..., None], x[np.where(valid, grid, 0)], 0)

    def taken(x):
        return prompts.take_rows(x, grid, cells)

    found, expected = (
        jax.vmap(jax.value_and_grad(functools.partial(score, take)))(x) for take in (taken, indexed)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


def test_packed_rows_of_imagenets_prompts():
    """The figures of the docstring in clip/prompts.py."""
    ids = golden("imagenet_prompt_tokens")["token_ids"]
    packed = prompts.pack(task_from_token_ids(ids), 49407)
    assert ids.size == 77_000
    assert len(packed.prefix) + packed.grid.shape[1] == 18
    assert len(packed.prefix) + len(packed.tokens) == 4_170
    assert [len(rows) for rows in prompts.rows(packed)] == [4_176, 4_176]  # a multiple of 8


def test_gradients_flow_through_packed_prompts_as_through_plain_ones(tiny, forward):
    model, params = tiny
    task = task_from_token_ids(forward["token_ids"])
    packed = model.prompts(task)
    weights = np.random.default_rng(0).normal(size=forward["text_embeds"].shape)

    def plain(p):
        return (l2_normalize(model.encode_text(p, forward["token_ids"])) * weights).sum()

    def ours(p):
        return (model.class_embeddings(p, packed) * weights).sum()

    for a, b in zip(
        *(jax.tree.leaves(jax.jit(jax.grad(f))(params)) for f in (plain, ours)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("mask", [None, np.tril(np.ones((7, 7), bool))])
def test_attention_equals_jaxs(mask):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 7, 4, 8))
    allowed = None if mask is None else mask[None, None]
    expected = jax.nn.dot_product_attention(q, k, v, mask=allowed)
    np.testing.assert_allclose(attention(q, k, v, mask), expected, atol=1e-6)


@hypothesis.settings(max_examples=2)  # every shape compiles anew
@hypothesis.given(tokens=st.integers(1, 20), heads=st.integers(1, 3), seed=st.integers(0, 99))
@hypothesis.example(tokens=1, heads=1, seed=0)
@hypothesis.example(tokens=8, heads=2, seed=0)
def test_padded_fused_attention_is_plain_attention(tokens, heads, seed):
    """Values and gradients, of second order too; JAX's kernel for CPUs stands for cuDNN's."""
    inputs = jax.random.normal(jax.random.key(seed), (3, 2, tokens, heads, 8))
    weights = jax.random.normal(jax.random.key(seed + 100), inputs.shape[1:])

    def found(fused):
        def score(*inputs):
            return (jnp.sin(attention(*inputs, fused=fused)) * weights).sum()

        def both(*inputs):
            steepness = jnp.stack(jax.grad(score, (0, 1, 2))(*inputs))
            return score(*inputs) + (steepness**3).sum()

        return jax.jit(jax.value_and_grad(both, (0, 1, 2)))(*inputs)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        found("xla"),
        found(None),
    )


def test_fused_attention_changes_no_model(tiny):
    """Embeddings and gradients of a ViT whose number of tokens is no multiple of 8."""
    model, params = tiny
    arch = model.vision.arch._replace(fused_attention="xla")
    fused = dataclasses.replace(model, vision=model.vision.clone(arch=arch))
    pixels = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))

    def score(model, params):
        return (model.encode_image(params, pixels) ** 2).sum()

    assert "custom_vjp" in str(jax.make_jaxpr(functools.partial(score, fused))(params))
    ours, theirs = (
        jax.jit(jax.grad(functools.partial(score, one)))(params) for one in (fused, model)
    )
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5 * scale), ours, theirs)


def test_fused_attention_is_mapped_as_plain_attention():
    """Over any axis, also where one array is the same for all."""
    x = jax.random.normal(jax.random.key(0), (3, 3, 2, 5, 2, 8))

    def found(fused, axes):
        def score(*inputs):
            return (jnp.sin(attention(*inputs, fused=fused)) * inputs[0]).sum()

        inputs = [
            y[0] if axis is None else jnp.moveaxis(y, 0, axis)
            for y, axis in zip(x, axes, strict=True)
        ]
        return jax.jit(jax.vmap(jax.value_and_grad(score, (0, 1, 2)), axes))(*inputs)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for axes in ((0, 0, 0), (2, 2, 2), (0, None, 0)):
        jax.tree.map(close, found("xla", axes), found(None, axes))


def test_cudnns_attention_can_be_traced(tiny, monkeypatch):
    """Derived and mapped, as for a GPU that is not here; its products are counted."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    half = jaxtta.load(GOLDEN / "tiny-clip", compute_dtype=jnp.bfloat16)[0]
    assert jaxtta.models.with_fused_attention(half).vision.arch.fused_attention == "cudnn"
    x = jax.ShapeDtypeStruct((3, 4, 17, 2, 8), jnp.bfloat16)

    def score(*inputs):
        return attention(*inputs, fused="cudnn").astype(jnp.float32).sum()

    program = jax.make_jaxpr(jax.vmap(jax.grad(score, (0, 1, 2))))(x, x, x)
    assert [one.shape for one in program.out_avals] == 3 * [x.shape]
    product = 2 * 3 * 4 * 24 * 24 * 2 * 8  # of padded queries and keys
    assert count_flops(program.jaxpr) == (2 + 2 + 5) * product  # forward twice, and backward
    wide = jaxtta.models.with_fused_attention
    arch = half.vision.arch._replace(width=2 * 256, heads=2)
    with pytest.raises(ValueError, match="fused attention: "):
        wide(dataclasses.replace(half, vision=half.vision.clone(arch=arch)))


def test_fused_attention_is_refused_where_it_cannot_run(tiny, towers, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(cudnn, "check_cudnn_version", missing)
    half = jaxtta.load(GOLDEN / "tiny-clip", compute_dtype=jnp.bfloat16)[0]
    for model, message in (
        (tiny[0], "needs compute_dtype bfloat16 or float16, not float32"),
        (towers["resnet"][0], "needs a ViT for the images"),
        (towers["nnx"][0], "needs a ViT for the images"),
        (half, "needs an NVIDIA GPU with cuDNN: cuDNN is not detected"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxtta.models.with_fused_attention(model)
    with pytest.raises(ValueError, match="fused attention needs a GPU, JAX has a cpu"):
        jaxtta.load(GOLDEN / "tiny-clip", compute_dtype=jnp.bfloat16, fused_attention=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives_of_layer_norm_are_those_of_its_formula(dtype):
    """Also of second order."""
    x, dy = jax.random.normal(jax.random.key(0), (2, 6, 16)).astype(dtype)
    scale, bias = jax.random.normal(jax.random.key(1), (2, 16))

    def formula(x, scale, bias):
        wide = x.astype(jnp.float32)
        y = (wide - wide.mean(-1, keepdims=True)) / jnp.sqrt(wide.var(-1, keepdims=True) + 1e-5)
        return (y * scale + bias).astype(x.dtype)

    def found(norm):
        def score(*inputs):
            return (jnp.sin(norm(*inputs)) * dy).sum().astype(jnp.float32)

        def both(*inputs):
            return score(*inputs) + sum((g**3).sum() for g in jax.grad(score, (0, 1, 2))(*inputs))

        return jax.jit(jax.value_and_grad(both, (0, 1, 2)))(x, scale, bias)

    tolerance = 1e-4 if dtype == "float32" else 5e-2
    for ours, theirs in zip(
        *map(jax.tree.leaves, (found(lambda *a: layer_norm(*a, 1e-5)), found(formula))), strict=True
    ):
        most = np.abs(theirs).max()
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=tolerance * most
        )


def test_imagenet_prompts_tokenise_as_published(tiny, shared):
    import json

    from transformers import AutoTokenizer

    names = json.loads((shared / "data/imagenet-class-names.json").read_text()).values()
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/clip-tokenizer")
    ids = tokenizer(
        [f"a photo of a {name}." for name in names], padding="max_length", max_length=77
    )["input_ids"]
    np.testing.assert_array_equal(ids, golden("imagenet_prompt_tokens")["token_ids"])


def test_zero_shot_task_of_the_embedded_model(embedded):
    model, params = embedded
    task = zero_shot_task(model, ["cat", "fire_truck"], ["a photo of a {}.", "a {}."])
    assert task.class_names == ("cat", "fire truck")
    assert task.token_ids.shape[:2] == (2, 2)
    one = zero_shot_task(model, ["cat", "fire truck"], ["a photo of a {}."])
    two = zero_shot_task(model, ["cat", "fire truck"], ["a {}."])
    jitted = jax.jit(model.class_embeddings)
    embed = lambda t: np.asarray(jitted(params, model.prompts(t)))  # noqa: E731
    mean = embed(one) + embed(two)
    np.testing.assert_allclose(
        embed(task), mean / np.linalg.norm(mean, axis=-1, keepdims=True), atol=1e-5
    )


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["cat"], ["a {}."], "at least two classes"),
        (["cat", ""], ["a {}."], "class name 1 is empty"),
        (["cat", "dog"], ["a cat."], "needs one {}"),
        (["cat", "dog"], [], "at least one prompt template"),
        ("cat", ["a {}."], "lists of strings"),
        (["cat", "dog " * 40], ["a {}."], "takes at most 32"),
    ],
)
def test_bad_tasks_are_refused(embedded, names, templates, message):
    with pytest.raises(ValueError, match=message):
        zero_shot_task(embedded[0], names, templates)


def test_names_that_are_no_strings_are_refused(embedded):
    with pytest.raises(TypeError, match=r"class_names holds 3, expected strings"):
        zero_shot_task(embedded[0], [3, 4])


@pytest.mark.parametrize(
    ("text", "ids"), json.loads((GOLDEN / "open_clip_tokens.json").read_text()).items()
)
def test_tokens_equal_open_clips(embedded, text, ids):
    """Of its SimpleTokenizer with the embedded model's merges, without start and end."""
    row = zero_shot_task(embedded[0], ["cat", "dog"], [f"{text} {{}}"]).token_ids[0, 0].tolist()
    ends = zero_shot_task(embedded[0], ["cat", "dog"], ["{}"]).token_ids[0, 0].tolist()
    assert row[: len(ids) + len(ends)] == [ends[0], *ids, *ends[1:]]


MENDED = {  # as open_clip's `_clean_lower` makes it of them, but for the case
    "Levi\u2019s jeans": "Levi's jeans",
    "\u201cred\u201d car": '"red" car',
    "\ufb01sh": "fish",
    "\uff24\uff2f\uff27": "DOG",
    "fish &amp; chips": "fish & chips",
    "fish &amp;amp; chips": "fish & chips",
    "cafe\u0301": "caf\u00e9",
    "cafÃ©": "café",
    "a\u00a0  big\tdog\n": "a big dog",
    "crane_(bird)": "crane (bird)",
}


@pytest.mark.parametrize("given", MENDED)
def test_names_and_templates_are_mended_as_clips_tokenizer_mends_text(embedded, given):
    model, _ = embedded
    task = zero_shot_task(model, [given, "cat"])
    expected = zero_shot_task(model, [MENDED[given], "cat"])
    np.testing.assert_array_equal(task.token_ids, expected.token_ids)
    text = given.replace("_", " ")
    np.testing.assert_array_equal(
        zero_shot_task(model, ["cat", "dog"], [f"{text} of a {{}}."]).token_ids,
        zero_shot_task(model, ["cat", "dog"], [f"{MENDED[given]} of a {{}}."]).token_ids,
    )


def test_names_that_are_the_same_after_mending_are_said(embedded, caplog):
    task = zero_shot_task(embedded[0], ["maillot", "Levi’s", "maillot", "levi's", "cat"])
    assert task.classes == 5
    assert "'maillot' (0) and 'maillot' (2); 'Levi’s' (1) and \"levi's\" (3)" in caplog.text
    caplog.clear()
    zero_shot_task(embedded[0], ["cat", "dog"])
    assert not caplog.text


WHOLE = "tokenizer.json", "tokenizer_config.json"
BARE = "vocab.json", "merges.txt"


@pytest.mark.parametrize(
    "files",
    [
        WHOLE,
        WHOLE[:1],
        BARE,
        (*BARE, "special_tokens_map.json"),
        (*BARE, "config.json"),
        (*BARE, "tokenizer_config.json"),
        (*BARE, "timm"),
        (*BARE, "no class"),
    ],
    ids="-".join,
)
def test_any_of_a_tokenizers_files_make_one(embedded, tmp_path, files):
    from transformers import AutoTokenizer

    model, _ = embedded
    source, saved, folder = Path(model.source), tmp_path / "saved", tmp_path / "model"
    AutoTokenizer.from_pretrained(source).save_pretrained(saved)
    folder.mkdir()
    for name in files:
        if name == "timm":  # beside OpenCLIP's files
            (folder / "config.json").write_text('{"architecture": "vit_base_patch16_clip_224"}')
        elif name == "no class":
            (folder / "tokenizer_config.json").write_text('{"model_max_length": 32}')
        else:
            shutil.copy(source / name if (source / name).exists() else saved / name, folder)
    ours = zero_shot_task(dataclasses.replace(model, source=str(folder)), ["Cat's", "dog"])
    expected = zero_shot_task(model, ["Cat's", "dog"])
    np.testing.assert_array_equal(ours.token_ids, expected.token_ids)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", '{"a": 0}', "vocab.json: is not CLIP's"),
        ("vocab.json", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("merges.txt", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("merges.txt", "", "merges.txt: has 0 merges, expected the 344 of vocab.json"),
        ("merges.txt", "#version: 0.2\ni n\nt h\n", "merges.txt: has 2 merges, expected the 344"),
        ("tokenizer.json", "{", "its tokenizer cannot be read"),
    ],
)
def test_bad_tokenizers_are_refused(embedded, tmp_path, name, content, message):
    for file in BARE:
        shutil.copy(Path(embedded[0].source) / file, tmp_path)
    (tmp_path / name).write_text(content)
    model = dataclasses.replace(embedded[0], source=str(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        zero_shot_task(model, ["cat", "dog"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((3, 4)), "must be integers"),
        (np.zeros((1, 4), int), "at least two classes"),
        (np.full((2, 4), 5), "no end-of-text"),
        (np.full((2, 4), 99), "the model knows 0 to 63"),
        (np.full((2, 20), 1) + 62 * (np.arange(20) == 19), "takes at most 16"),
    ],
)
def test_bad_token_ids_are_refused(tiny, ids, message):
    with pytest.raises(ValueError, match=message):
        tiny[0].prompts(task_from_token_ids(ids))


def test_normalize_takes_bytes_and_floats_alike(tiny):
    model, _ = tiny
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(
        model.normalize(images), model.normalize(images / np.float32(255)), atol=1e-6
    )
    assert float(model.normalize(jnp.full((1, 32, 32, 3), 2.0)).min()) > 5  # not clipped


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 30, 32, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((2, 3, 32, 32), np.float32),
        np.zeros((2, 32, 32, 3), np.int32),
    ],
)
def test_images_of_another_shape_or_dtype_are_refused(tiny, images):
    with pytest.raises(ValueError, match=r"images must"):
        tiny[0].normalize(images)


def test_a_tree_that_is_not_the_models_is_refused(tiny):
    model, params = tiny
    task = task_from_token_ids(np.full((2, 4), 63))
    for call in (model.init_context, lambda tree, _: model.encode_image(tree, np.zeros((1, 1)))):
        with pytest.raises(ValueError, match=r"params has params and no (text|vision)_model"):
            call({"params": params}, task)


def test_bfloat16_stays_close(tiny, forward):
    from conftest import GOLDEN

    model, params = jaxtta.load(GOLDEN / "tiny-clip", compute_dtype=jnp.bfloat16)
    embeddings = jax.jit(model.encode_image)(params, forward["images"])
    assert embeddings.dtype == jnp.float32
    assert 1e-6 < relative(embeddings, forward["image_embeds"]) < 2e-2


def test_rematerialisation_changes_no_gradient(tiny, forward):
    from conftest import GOLDEN

    model, params = tiny
    lean, _ = jaxtta.load(GOLDEN / "tiny-clip", remat=True)
    packed = model.prompts(task_from_token_ids(forward["token_ids"]))

    def loss(model, params):
        images = model.encode_image(params, forward["images"])
        return (images @ model.class_embeddings(params, packed).T).sum()

    grads = [jax.jit(jax.grad(lambda p, m=m: loss(m, p)))(params) for m in (model, lean)]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
