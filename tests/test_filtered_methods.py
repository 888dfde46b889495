"""SAR, EATA, ETA, DeYO, ROID and RoTTA: golden numbers, laws, and their compositions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import golden, images_of
from flax.traverse_util import flatten_dict

from jaxtta import models
from jaxtta.adapters.deyo import deyo
from jaxtta.adapters.eata import eata, eta
from jaxtta.adapters.fisher import eata_fisher
from jaxtta.adapters.roid import roid
from jaxtta.adapters.rotta import rotta
from jaxtta.adapters.sar import sar

PRECISIONS = pytest.mark.parametrize("dtype", ["float32", "float64"])


def close(dtype, single):
    return 1e-9 if dtype == "float64" else single


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Golden:
    """A golden file, or a part of one, with the model in a precision."""

    def __init__(self, name, tiny, dtype, part=""):
        self.file, self.part, self.dtype = golden(name), part, dtype
        self.meta = json.loads(str(self.file["meta"]))
        self.model = tiny[0]
        self.params = jax.tree.map(lambda x: jnp.asarray(x, dtype), tiny[1])
        self.task = models.task_from_token_ids(self.file["token_ids"])

    def __getitem__(self, name):
        return self.file[self.part + name]

    def images(self, name="images", part=None):
        """Such that the model's pixels are the file's, in double precision too."""
        settings = self.model.preprocessing
        mean, std = np.asarray(settings.mean), np.asarray(settings.std)
        raw = self.file[(self.part if part is None else part) + name]
        return np.asarray(images_of(self.model, (raw / 255 - mean) / std), self.dtype)

    def change(self, params, source=None, step=None, name="ln"):
        """The adapted parameters' change from the source as one vector, and the file's."""
        start, end = (flatten_dict(tree) for tree in (source or self.params, params))
        names = {p: f"{name}/{'.'.join(p).replace('scale', 'weight')}" for p in end}
        ours = np.concatenate([np.ravel(np.asarray(end[p], np.float64) - start[p]) for p in end])
        rows = [np.ravel(self[names[p]][step] - np.asarray(start[p], np.float64)) for p in end]
        return ours, np.concatenate(rows)

    def run(self, adapter, batches, params=None):
        """State and prediction of each batch."""
        params = self.params if params is None else params
        state, step = adapter.init(params), jax.jit(adapter.step)
        for number, batch in enumerate(batches):
            state, prediction = step(params, state, batch)
            assert prediction.logits.dtype == self.dtype
            assert not prediction.metrics["skipped"]
            yield number, state, prediction

    def near(self, ours, name, step, single=1e-4):
        gap = np.abs(np.asarray(ours, np.float64) - self[name][step]).max()
        assert gap < close(self.dtype, single), (name, step, gap)

    def near_update(self, adapted, step, name="ln"):
        ours, theirs = self.change(adapted, step=step, name=name)
        gap = np.linalg.norm(ours - theirs)
        share = gap / max(np.linalg.norm(theirs), 1e-30) if np.any(theirs) else gap
        assert share < close(self.dtype, 2e-4), (name, step, share)


# Golden numbers


@PRECISIONS
@pytest.mark.parametrize("part", ["", "recovery/"])
def test_sar_equals_the_published_code(tiny, part, dtype):
    with jax.enable_x64(dtype == "float64"):
        reference = Golden("sar", tiny, dtype, part)
        meta, params = reference.meta, dict(reference.params)
        if part:
            params["logit_scale"] = jnp.log(jnp.asarray(meta["recovery_logit_scale"], dtype))
        adapter = sar(
            reference.model,
            reference.task,
            optimizer=optax.sgd(meta["lr"], momentum=meta["momentum"]),
            margin=meta["margin_fraction"],
            radius=meta["rho"],
            recovery=meta["recovery_threshold"],
            reference_quirks=True,
        )
        for number, state, prediction in reference.run(adapter, reference.images(), params):
            metrics = prediction.metrics
            reference.near(prediction.logits, "logits", number)
            reference.near(metrics["loss"], "loss", number)
            reference.near(metrics["loss_perturbed"], "loss_perturbed", number, 2e-3)
            reference.near(state.memory, "ema", number, 2e-3 if part else 1e-4)
            assert metrics["selected"] == reference["selected"][number].sum()
            assert metrics["reset"] == reference["reset"][number]
            reference.near_update(state.adapted, number)


@PRECISIONS
@pytest.mark.parametrize("part", ["", "eta/"])
def test_eata_equals_the_published_code(tiny, part, dtype):
    with jax.enable_x64(dtype == "float64"):
        reference = Golden("eata", tiny, dtype, part)
        meta, model, task = reference.meta, reference.model, reference.task
        settings = {
            "optimizer": optax.sgd(meta["lr"], momentum=meta["momentum"]),
            "margin": meta["margin_fraction"],
            "similarity": meta["d_margin"],
        }
        if part:
            adapter = eta(model, task, **settings)
        else:
            clean = reference.images("source_images")
            fisher = eata_fisher(model, task, reference.params, clean)
            zero = jax.tree.map(jnp.zeros_like, fisher)
            ours, theirs = reference.change(fisher, zero, ..., "fisher")
            assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < close(dtype, 2e-4)
            weight = meta["fisher_alpha"]
            adapter = eata(model, task, fisher=fisher, fisher_weight=weight, **settings)
        before = 0
        for number, state, prediction in reference.run(adapter, reference.images(part="")):
            metrics = prediction.metrics
            reference.near(prediction.logits, "logits", number)
            reference.near(metrics["loss"], "loss", number)
            reference.near(state.memory, "model_probs", number)
            assert metrics["selected"] == reference["selected"][number].sum()
            if not part:
                reference.near(metrics["entropy"], "entropy_term", number)
                reference.near(metrics["fisher"], "fisher_term", number)
                assert metrics["reliable"] == reference["reliable"][number].sum()
            reference.near_update(state.adapted, number)
            if not metrics["selected"]:
                same(state._replace(seen=before.seen), before)
            before = state
        assert not metrics["selected"]  # the last batch


@PRECISIONS
def test_deyo_equals_the_published_code(tiny, dtype):
    with jax.enable_x64(dtype == "float64"):
        reference = Golden("deyo", tiny, dtype)
        meta = reference.meta
        table = jnp.asarray(np.concatenate(reference["permutation"]))
        adapter = deyo(
            reference.model,
            reference.task,
            optimizer=optax.sgd(meta["lr"], momentum=meta["momentum"]),
            margin=meta["entropy_margin_fraction"],
            weight_margin=meta["weight_margin_fraction"],
            threshold=meta["plpd_threshold"],
            patches=meta["patches_per_side"],
            permute=lambda key, index: table[index],
        )
        for number, state, prediction in reference.run(adapter, reference.images()):
            metrics = prediction.metrics
            reference.near(prediction.logits, "logits", number)
            reference.near(metrics["loss"], "loss", number)
            for name in ("reliable", "selected"):
                assert metrics[name] == reference[name][number].sum()
            reference.near_update(state.adapted, number)


@PRECISIONS
def test_roid_equals_the_published_code(tiny, dtype):
    with jax.enable_x64(dtype == "float64"):
        reference = Golden("roid", tiny, dtype)
        meta = reference.meta
        views = jnp.asarray(np.concatenate(reference.images("views")))

        def fed(key, index, image):
            return views[index]

        adapter = roid(
            reference.model,
            reference.task,
            optimizer=optax.sgd(meta["lr"], momentum=meta["momentum"], nesterov=True),
            temperature=meta["temperature"],
            source_share=1 - meta["source_momentum"],
            reference_quirks=True,
            augment=fed,
        )
        for number, state, prediction in reference.run(adapter, reference.images()):
            metrics = prediction.metrics
            reference.near(prediction.logits, "corrected_logits", number)
            reference.near(metrics["loss"], "loss", number)
            reference.near(state.memory.average, "class_probs", number)
            assert metrics["selected"] == reference["kept"][number].sum()
            reference.near_update(state.adapted, number)


@PRECISIONS
def test_rotta_equals_the_published_code(tiny, dtype):
    with jax.enable_x64(dtype == "float64"):
        reference = Golden("rotta", tiny, dtype)
        meta = reference.meta
        views = jnp.asarray(np.concatenate(reference.images("views")))
        adapter = rotta(
            reference.model,
            reference.task,
            optimizer=optax.adam(meta["lr"]),
            places=meta["capacity"],
            every=meta["update_frequency"],
            teacher_share=meta["nu"],
            augment=lambda key, index, image: views[index],
        )
        updates = 0
        for number, state, prediction in reference.run(adapter, reference.images()):
            reference.near(prediction.logits, "logits", number)
            bank = state.memory.bank
            order = np.lexsort((bank.arrival, bank.label, bank.label < 0))
            there = np.asarray(bank.label)[order] >= 0
            for ours, theirs in (("index", "memory"), ("age", "ages"), ("label", "memory_classes")):
                found, expected = np.asarray(getattr(bank, ours))[order], reference[theirs][number]
                np.testing.assert_array_equal(found[there], expected[there])
            np.testing.assert_array_equal(there, reference["memory"][number] >= 0)
            reference.near_update(state.adapted, number)
            ours, theirs = reference.change(state.memory.teacher, step=number, name="teacher")
            assert np.abs(ours - theirs).max() < close(dtype, 2e-7)
            updates += int(prediction.metrics["updates"])
        assert updates == meta["updates"]
