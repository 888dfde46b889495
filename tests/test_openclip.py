"""OpenCLIP checkpoints and ResNet towers: golden numbers, full sizes, bad input."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, golden, images_of, relative, size_of
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxtta import adapters, evaluate, models, tree
from jaxtta.models.checkpoints import open_clip as openclip
from jaxtta.models.resnet import ResNet

NAMES = ("resnet", "vit", "vit_quickgelu")
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def golden_folder(name):
    return GOLDEN / f"openclip-{name.replace('_', '-')}"


@pytest.fixture(scope="module")
def resnet():
    return models.load(golden_folder("resnet"))


@pytest.fixture(scope="module")
def reference():
    return golden("openclip_resnet")


@pytest.fixture(scope="module")
def task(reference):
    return models.task_from_token_ids(reference["token_ids"])


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_equal_openclips(name, agrees):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every parameter has its place
        model, params = models.load(golden_folder(name))
    expected = golden(f"openclip_{name}")
    images = jax.jit(model.encode_image)(params, expected["images"])
    agrees("OpenCLIP", "image embeddings", images, expected["image_embeds"], norm=1e-5)
    text = jax.jit(model.encode_text)(params, expected["token_ids"])
    agrees("OpenCLIP", "text embeddings", text, expected["text_embeds"], norm=1e-5)
    prompts = model.prompts(models.task_from_token_ids(expected["token_ids"]))
    packed = jax.jit(model.class_embeddings)(params, prompts)
    assert relative(packed, models.l2_normalize(expected["text_embeds"])) <= 1e-5
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params)


def test_batclip_on_the_resnet_equals_openclips(resnet, reference, task):
    model, params = resnet
    adapter = evaluate.make_adapter(evaluate.parse_adapter("batclip"), model, task)
    state, step = adapter.init(params), jax.jit(adapter.step)
    for t, images in enumerate(images_of(model, reference["batclip_images"])):
        state, prediction = step(params, state, images)
        assert np.abs(prediction.logits - reference["batclip_logits"][t]).max() <= 1e-3
        assert float(prediction.metrics["loss"]) == pytest.approx(
            float(reference["batclip_loss"][t]), abs=1e-4
        )
    start, end = flatten_dict(params), flatten_dict(state.adapted)
    places = {
        openclip._path(name.removeprefix("norm/"), openclip._RESNET_NAMES): name
        for name in reference.files
        if name.startswith("norm/")
    }
    assert set(places) == set(end)  # scales and biases, no running statistics
    ours = np.concatenate([np.ravel(end[p] - start[p]) for p in places])
    theirs = np.concatenate([np.ravel(reference[n] - start[p]) for p, n in places.items()])
    assert relative(ours, theirs) <= 5e-3


def test_tent_moves_the_resnets_scales_and_biases_and_lowers_entropy(resnet, reference, task):
    model, params = resnet
    adapter = adapters.tent(model, task, optimizer=optax.adam(1e-3))
    state, step = adapter.init(params), jax.jit(adapter.step)
    assert set(state.adapted) == {"vision_model"}
    assert {path[-1] for path in flatten_dict(state.adapted)} == {"scale", "bias"}
    images, entropies = images_of(model, reference["batclip_images"][0]), []
    for _ in range(5):
        state, prediction = step(params, state, images)
        entropies.append(float(prediction.metrics["entropy"]))
    assert entropies[-1] < entropies[0]


def padded(images, rows):
    """A batch with more rows than images, the others full of what must not be looked at."""
    filled = np.concatenate([np.full_like(images[:1], np.nan).repeat(rows, 0), images])
    mask = np.arange(len(filled)) >= rows
    return models.Batch(jnp.asarray(filled), jnp.asarray(mask), jnp.arange(len(filled)))


def test_a_step_of_tent_on_the_resnet_is_the_entropys_gradient(resnet, reference, task):
    own, params = resnet
    images = images_of(own, reference["batclip_images"][0])
    model, adapter = (
        own.with_batch_norm_statistics("batch"),
        adapters.tent(own, task, optimizer=optax.sgd(0.1)),
    )
    start = adapter.init(params)
    chosen, _ = tree.partition(params, tree.normalisation_parameters("image"))

    def entropy(adapted):
        merged = tree.merge(params, adapted)
        embeddings = model.encode_image(merged, model.normalize(images))
        logits = jnp.exp(params["logit_scale"]) * models.l2_normalize(embeddings) @ start.context.T
        return -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(1).mean()

    value, gradients = jax.jit(jax.value_and_grad(entropy))(chosen)
    state, prediction = jax.jit(adapter.step)(params, start, padded(images, 3))
    assert float(prediction.metrics["entropy"]) == pytest.approx(float(value), abs=1e-5)
    for new, old, gradient in zip(
        *map(jax.tree.leaves, (state.adapted, chosen, gradients)), strict=True
    ):
        np.testing.assert_allclose(new - old, -0.1 * gradient, rtol=1e-3, atol=1e-6)


def test_padding_enters_no_batch_statistics(resnet, reference, task):
    model, params = resnet
    images = images_of(model, reference["batclip_images"][0])
    adapter = adapters.batclip(model, task, optimizer=optax.sgd(0.1))
    start, step = adapter.init(params), jax.jit(adapter.step)
    state, prediction = step(params, start, images)
    assert np.abs(prediction.logits - reference["batclip_logits"][0]).max() <= 1e-3
    batch = padded(images, 3)
    again, other = step(params, start, batch)
    np.testing.assert_allclose(other.logits[3:], prediction.logits, atol=1e-3)
    update, expected = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.tree.map(jnp.subtract, *pair))])
        for pair in ((again.adapted, start.adapted), (state.adapted, start.adapted))
    )
    assert relative(update, expected) <= 1e-3
    images = jnp.nan_to_num(batch.images)
    _, other = step(params, start, batch._replace(images=images, mask=jnp.ones_like(batch.mask)))
    assert relative(other.logits[3:], prediction.logits) > 1e-2  # there was something to mask
    empty, _ = step(params, start, batch._replace(mask=jnp.zeros_like(batch.mask)))
    assert jax.tree.all(jax.tree.map(np.array_equal, empty.adapted, start.adapted))


def test_only_with_batch_statistics_do_images_depend_on_each_other(resnet, reference):
    (own, params), images = resnet, reference["images"]
    for model, apart in ((own, False), (own.with_batch_norm_statistics("batch"), True)):
        encode = jax.jit(model.encode_image)
        together = np.asarray(encode(params, images))
        difference = relative(encode(params, np.repeat(images[:1], 5, 0))[0], together[0])
        assert (difference > 1e-2) == apart
    assert model.with_batch_norm_statistics("running") == own


def test_a_vit_has_no_batch_statistics(tiny):
    assert tiny[0].with_batch_norm_statistics("batch") is tiny[0]


def test_no_gradient_reaches_running_statistics(resnet, reference):
    model, params = resnet
    gradients = jax.jit(jax.grad(lambda p: model.encode_image(p, reference["images"]).sum()))(
        params
    )
    for path, gradient in flatten_dict(gradients["vision_model"]).items():
        assert np.any(gradient) == (path[-1] not in ("mean", "var")) or path[-2:] == (
            "k_proj",
            "bias",  # a shift of all scores, which the softmax takes out
        )


def test_what_the_resnet_keeps_of_its_layers(resnet, reference):
    model, params = resnet
    out = jax.jit(model.image_features)(params, reference["images"])
    assert out.pooled.shape == (5, 512)
    assert [x.shape for x in out.hidden_states] == [
        (5, 256, 16),
        (5, 256, 64),
        (5, 64, 128),
        (5, 16, 256),
        (5, 4, 512),
    ]
    assert out.layer_features is None
    with pytest.raises(ValueError, match="no layer features"):
        models.feature_statistics(model, params, [images_of(model, reference["images"])])


def test_bfloat16_and_recomputation_stay_close(resnet, reference, task):
    model, params = resnet
    images = reference["images"]
    half, _ = models.load(golden_folder("resnet"), compute_dtype="bfloat16")
    out = jax.jit(half.encode_image)(params, images)
    assert out.dtype == np.float32
    assert 1e-5 < relative(out, reference["image_embeds"]) < 0.05
    again, _ = models.load(golden_folder("resnet"), remat=True)

    def gradient(model):
        return jax.jit(jax.grad(lambda p: (model.encode_image(p, images) ** 2).sum()))(params)

    for a, b in zip(*map(jax.tree.leaves, (gradient(again), gradient(model))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1, np.abs(b).max()))


def test_a_vit_has_the_tree_of_a_transformers_checkpoint(tmp_path):
    model, params = models.load(golden_folder("vit"))
    models.save(tmp_path, model, params)
    again, loaded = models.load(tmp_path)
    assert (again.vision, again.text, again.eos_token_id) == (model.vision, model.text, 2)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))
    shutil.copytree(golden_folder("resnet"), tmp_path, dirs_exist_ok=True)
    assert models.load(tmp_path)[0].vision == model.vision  # where both are, transformers' is read
    (tmp_path / "model.safetensors").unlink()
    assert isinstance(models.load(tmp_path)[0].vision, ResNet)  # whatever the other config says


def test_a_resnet_is_no_transformers_checkpoint(resnet, tmp_path):
    with pytest.raises(ValueError, match="a ResNet image tower cannot be saved"):
        models.save(tmp_path / "new", *resnet)
    assert not (tmp_path / "new").exists()


# Full sizes, in OpenCLIP's layout, written here without the library's help.


def config_of(embedding, vision, width=512, heads=8):
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": 12}
    return {"model_cfg": {"embed_dim": embedding, "vision_cfg": vision, "text_cfg": text}}


VIT_B_32 = config_of(512, {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32})
RN50 = config_of(1024, {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None})
RN101 = config_of(
    512, {"image_size": 224, "layers": [3, 4, 23, 3], "width": 64, "patch_size": None}
)
RN50X4 = config_of(
    640, {"image_size": 288, "layers": [4, 6, 10, 6], "width": 80, "patch_size": None}, 640, 10
)


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def batch_norm(name, width):
    statistics = {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}
    return norm(name, width) | statistics | {f"{name}.num_batches_tracked": ()}


def dense(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def blocks(prefix, width, layers):
    shapes = {}
    for block in (f"{prefix}transformer.resblocks.{n}" for n in range(layers)):
        shapes |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width)}
        shapes |= {f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= dense(f"{block}.attn.out_proj", width, width)
        shapes |= dense(f"{block}.mlp.c_fc", width, 4 * width)
        shapes |= dense(f"{block}.mlp.c_proj", 4 * width, width)
    return shapes


def vit_shapes(embedding, image_size, layers, width, patch_size):
    return {
        "visual.conv1.weight": (width, 3, patch_size, patch_size),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((image_size // patch_size) ** 2 + 1, width),
        "visual.proj": (width, embedding),
        **norm("visual.ln_pre", width),
        **norm("visual.ln_post", width),
        **blocks("visual.", width, layers),
    }


def resnet_shapes(embedding, image_size, layers, width, patch_size):
    shapes, before = {}, 3
    for number, after in enumerate((width // 2, width // 2, width), 1):
        shapes |= {f"visual.conv{number}.weight": (after, before, 3, 3)}
        shapes |= batch_norm(f"visual.bn{number}", after)
        before = after
    for stage, count in enumerate(layers):
        inner = width * 2**stage
        for name in (f"visual.layer{stage + 1}.{n}" for n in range(count)):
            for number, shape in enumerate(
                ((inner, before, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)), 1
            ):
                shapes |= {f"{name}.conv{number}.weight": shape}
                shapes |= batch_norm(f"{name}.bn{number}", shape[0])
            if name.endswith(".0"):
                shapes |= {f"{name}.downsample.0.weight": (4 * inner, before, 1, 1)}
                shapes |= batch_norm(f"{name}.downsample.1", 4 * inner)
            before = 4 * inner
    for name, size in (("q", before), ("k", before), ("v", before), ("c", embedding)):
        shapes |= dense(f"visual.attnpool.{name}_proj", before, size)
    positions = (image_size // 32) ** 2 + 1
    return shapes | {"visual.attnpool.positional_embedding": (positions, before)}


def all_shapes(config):
    config = config["model_cfg"]
    embedding, vision, text = config["embed_dim"], config["vision_cfg"], config["text_cfg"]
    tower = resnet_shapes if isinstance(vision["layers"], list) else vit_shapes
    return {
        "token_embedding.weight": (text["vocab_size"], text["width"]),
        "positional_embedding": (text["context_length"], text["width"]),
        "text_projection": (text["width"], embedding),
        "logit_scale": (),
        **norm("ln_final", text["width"]),
        **blocks("", text["width"], text["layers"]),
        **tower(embedding, **vision),
    }


def random_weights(shapes):
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            yield name, np.array(3)
        elif len(shape) == 1 and name.endswith(("running_var", "weight")):
            yield name, np.ones(shape, np.float16)
        else:
            scale = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.02
            values = rng.standard_normal(shape, np.float32) * scale
            yield name, np.asarray(values, np.float16)


def write_config(folder, config):
    (folder / CONFIG).write_text(json.dumps(config))
    return folder / CONFIG


@pytest.mark.slow
@pytest.mark.parametrize("config", [RN50, VIT_B_32], ids=["RN50", "ViT-B-32"])
def test_full_size_models_load_and_run(config, tmp_path):
    write_config(tmp_path, config)
    save_file(dict(random_weights(all_shapes(config))), tmp_path / WEIGHTS)
    model, params = models.load(tmp_path)
    (tmp_path / WEIGHTS).unlink()  # a third of a gigabyte
    task = models.task_from_token_ids([[49406, 320, 49407, 0], [49406, 49407, 0, 0]])
    images = model.preprocess([Image.effect_mandelbrot((300, 260), (-3, -2.5, 2, 2.5), 100)])
    out = jax.jit(model)(params, model.prompts(task), images)
    assert out.embeddings.shape == (1, config["model_cfg"]["embed_dim"])
    assert np.isfinite(out.logits).all()
    assert out.embeddings.std() > 0


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (RN50, 102_007_137),
        (RN101, 119_688_033),
        (RN50X4, 178_300_601),
        (VIT_B_32, 151_277_313),
    ],
    ids=["RN50", "RN101", "RN50x4", "ViT-B-32"],
)
def test_published_numbers_of_parameters(config, published, tmp_path):
    model = openclip.from_config(write_config(tmp_path, config))
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    assert size_of([x for path, x in shapes.items() if path[-1] not in ("mean", "var")]) == (
        published
    )


# What the configuration says of images.


def with_preprocessing(folder, **settings):
    config = json.loads((golden_folder("vit") / CONFIG).read_text())
    config["preprocess_cfg"] = settings
    return openclip.from_config(write_config(folder, config)).preprocessing


def test_preprocessing(tmp_path):
    default = models.load(golden_folder("vit"))[0].preprocessing
    assert default == with_preprocessing(tmp_path)
    assert default == with_preprocessing(tmp_path, size=[32, 32], mode="RGB", interpolation=None)
    assert (default.resize, default.crop, default.resample) == (32, (32, 32), 3)
    other = with_preprocessing(
        tmp_path, interpolation="bilinear", resize_mode="squash", mean=[0.5] * 3, std=[0.25] * 3
    )
    assert other[1:6] == ((32, 32), None, 2, (0.5,) * 3, (0.25,) * 3)
    assert other(Image.new("L", (50, 70))).shape == (32, 32, 3)


PIXELS = golden("open_clip_pixels")


@pytest.mark.parametrize("name", [name for name in PIXELS if not name.startswith("image")])
def test_pixels_equal_open_clips(tmp_path, name):
    """What open_clip 3.3's transform makes of images of several sizes."""
    mode, interpolation, size = name.split("-")
    preprocessing = with_preprocessing(
        tmp_path, interpolation=interpolation, resize_mode=mode, fill_color=9
    )
    ours = preprocessing(Image.fromarray(PIXELS[f"image-{size}"])).astype(int)
    assert np.abs(ours - PIXELS[name]).max() <= 1


def test_settings_as_open_clip_reads_them(tmp_path, caplog):
    standard = with_preprocessing(tmp_path, size=32)
    assert "no preprocess_cfg" not in caplog.text
    assert with_preprocessing(tmp_path, interpolation="random") == standard
    assert with_preprocessing(tmp_path, mean=0.5, std=0.25).mean == (0.5,) * 3
    assert with_preprocessing(tmp_path, size=30) == standard
    assert "size is 30, the model's 32 is taken" in caplog.text
    assert with_preprocessing(tmp_path) == standard
    assert "has no preprocess_cfg: OpenCLIP's defaults are taken" in caplog.text
    config = write_config(tmp_path, json.loads((golden_folder("vit") / CONFIG).read_text()))
    said = models.describe_preprocessing(openclip.from_config(config))
    assert said.endswith(f"from {tmp_path / CONFIG}")
    assert "centre crop 32 (torchvision)" in said


# Bad input.


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden ViT to spoil."""
    return shutil.copytree(golden_folder("vit"), tmp_path / "checkpoint")


def edit(place, **changes):
    def spoil(folder):
        config = json.loads((folder / CONFIG).read_text())
        section = config
        for name in place.split(".") if place else ():
            section = section[name]
        section.update(changes)
        write_config(folder, config)

    return spoil


def edit_weights(**changes):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        for name, array in changes.items():
            tensors[name.replace("__", ".")] = array
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)

    return spoil


VISION, TEXT = "model_cfg.vision_cfg", "model_cfg.text_cfg"
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / CONFIG).write_text("{"), ValueError, f"{CONFIG}: is not JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), ValueError, "holds no JSON object"),
        (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "has no config.json"),
        (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, f"has none of {WEIGHTS}"),
        (
            lambda f: (f / WEIGHTS).rename(f / "open_clip_pytorch_model.bin"),
            ValueError,
            "pickled weights can run code .*jaxtta convert",
        ),
        (lambda f: (f / WEIGHTS).write_bytes(b"nonsense"), ValueError, "is damaged or no safetens"),
        (edit("model_cfg", embed_dim="big"), ValueError, "model_cfg.embed_dim is 'big', expected"),
        (
            edit("model_cfg", cast_in=True),
            ValueError,
            "model_cfg.cast_in is True, which is not sup",
        ),
        (
            edit("model_cfg", multimodal_cfg={"width": 8}),
            ValueError,
            "describes a CoCa model .* not",
        ),
        (edit("model_cfg", vision_cfg=None), ValueError, "vision_cfg is None, expected an object"),
        (
            edit(VISION, timm_model_name="x"),
            ValueError,
            r"another timm image tower \(x\), which is",
        ),
        (
            edit(VISION, timm_model_name="eva02_base"),
            ValueError,
            "an EVA image tower .eva02_base., ",
        ),
        (
            edit(VISION, timm_model_name="convnext_tiny"),
            ValueError,
            "a ConvNeXt .* own ViT and Res",
        ),
        (edit(VISION, attentional_pool=True), ValueError, "attentional_pool is True, which is"),
        (edit(VISION, pool_type="avg"), ValueError, "pool_type is 'avg', expected 'tok'"),
        (edit(VISION, image_size=4), ValueError, "patch_size is 8, expected at most the image_si"),
        (edit(VISION, image_size=[32, 48]), ValueError, r"image_size is \[32, 48\], expected a po"),
        (edit(VISION, head_width=24), ValueError, "head_width is 24, expected a divisor of 64"),
        (edit(VISION, mlp_ratio="x"), ValueError, "mlp_ratio is 'x', expected a number above 0"),
        (edit(VISION, layers=2.5), ValueError, "vision_cfg.layers is 2.5, expected a positive"),
        (edit(VISION, layers=[1, 2]), ValueError, r"layers is \[1, 2\], expected a number of bl"),
        (edit(VISION, **RESNET | {"image_size": 50}), ValueError, "is 50, expected a multiple of"),
        (edit(VISION, **RESNET | {"width": 5}), ValueError, "width is 5, expected an even number"),
        (edit(VISION, **RESNET | {"head_width": 100}), ValueError, "is 100, expected a divisor"),
        (edit(VISION, **RESNET), ValueError, "parameters are missing, vision_model/"),
        (edit(TEXT, heads=5), ValueError, "heads is 5, expected a divisor of the width of 24"),
        (edit(TEXT, hf_model_name="x"), ValueError, r"a Hugging Face text tower \(x\), which is n"),
        (
            edit(TEXT, no_causal_mask=True),
            ValueError,
            "text_cfg.pool_type is None, expected 'last'",
        ),
        (
            edit(TEXT, pool_type="last"),
            ValueError,
            "text_cfg.pool_type is 'last', expected 'argmax'",
        ),
        (edit(TEXT, proj_type="mlp"), ValueError, "proj_type is 'mlp', expected linear or none"),
        (
            edit(TEXT, proj_type="none"),
            ValueError,
            "embed_dim is 16, expected a tower's width of 24",
        ),
        (edit(TEXT, norm_kwargs={"eps": 0}), ValueError, "norm_kwargs.eps is 0, expected a number"),
        (
            edit(TEXT, norm_kwargs={"bias": 1}),
            ValueError,
            "norm_kwargs.bias is 1, which is not sup",
        ),
        (edit(TEXT, act_kwargs={"a": 1}), ValueError, "act_kwargs is .'a': 1., expected .*tanh"),
        (
            edit(TEXT, tokenizer_kwargs={"clean": "x"}),
            ValueError,
            "clean is 'x', expected one of c",
        ),
        (
            edit(TEXT, tokenizer_kwargs={"s": 1}),
            ValueError,
            "tokenizer_kwargs.s is 1, which is not",
        ),
        (edit(TEXT, layers=0), ValueError, "text_cfg.layers is 0, expected a positive whole num"),
        (edit(TEXT, width=20), ValueError, r"has shape .*, expected \(20,\)"),
        (edit("preprocess_cfg", mean=[0.5]), ValueError, r"mean is \[0.5\], expected three numb"),
        (edit("preprocess_cfg", std=[0, 1, 1]), ValueError, "preprocess_cfg.std is .* above 0"),
        (edit("preprocess_cfg", interpolation="area"), ValueError, "expected one of bicubic"),
        (edit("preprocess_cfg", resize_mode="widest"), ValueError, "expected one of shortest"),
        (edit("preprocess_cfg", fill_color=300), ValueError, "a grey level from 0 to 255"),
        (edit_weights(visual__proj=None), ValueError, "visual_projection/kernel is missing"),
        (
            edit_weights(visual__proj=np.zeros((16, 64), np.float32)),
            ValueError,
            f"does not fit its {CONFIG}: .*kernel has shape .16, 64., expected .64, 16.",
        ),
        (
            edit_weights(
                transformer__resblocks__0__attn__in_proj_weight=np.zeros((71, 24), np.float32)
            ),
            ValueError,
            "v_proj/kernel has shape",
        ),
    ],
)
def test_bad_checkpoints_are_refused_in_one_sentence(folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        models.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bias_on_the_logits_and_a_custom_text_tower(folder):
    """Settings that SigLIP brought, on CLIP's own towers."""
    own, before = models.load(folder)
    tensors = load_file(folder / WEIGHTS)
    text = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    tensors = {f"text.{n}" if n.startswith(text) else n: x for n, x in tensors.items()}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    save_file(tensors | {"logit_bias": np.full(1, -3, np.float32)}, folder / WEIGHTS)
    changes = {"custom_text": True, "init_logit_bias": 0, "nonscalar_logit_scale": True}
    edit("model_cfg", **changes)(folder)
    model, params = models.load(folder)
    expected = golden("openclip_vit")
    text = jax.jit(model.encode_text)(params, expected["token_ids"])
    assert relative(text, expected["text_embeds"]) <= 1e-5
    images = images_of(model, expected["images"])
    prompts = model.prompts(models.task_from_token_ids(expected["token_ids"]))
    logits = jax.jit(model)(params, prompts, images).logits
    plain = jax.jit(own)(before, prompts, images).logits
    np.testing.assert_allclose(logits, plain - 3, rtol=1e-5, atol=1e-4)


def test_unused_parameters_are_named(folder):
    edit_weights(head__weight=np.zeros(3, np.float32))(folder)
    with pytest.warns(UserWarning, match=r"not used: head/kernel$"):
        models.load(folder)


@pytest.mark.parametrize("beside", ["nothing", "timm's files", "transformers' config"])
def test_a_hub_model_of_openclip_is_fetched_file_by_file(monkeypatch, folder, beside):
    if beside == "timm's files":
        (folder / "config.json").write_text('{"architecture": "vit_base_patch32_clip_224"}')
        (folder / "model.safetensors").write_bytes(b"timm's")
    if beside == "transformers' config":  # without weights that are read
        (folder / "config.json").write_text('{"model_type": "clip"}')
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
    model, _ = models.load("somebody/openclip-vit")
    assert model.source == str(folder)
    assert {CONFIG, WEIGHTS} <= set(asked)
    assert not any(name.endswith(".bin") for name in asked)
    assert ("model.safetensors" in asked) == (beside == "transformers' config")
