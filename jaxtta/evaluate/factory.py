"""Making adapters by name, for the scripts."""

import dataclasses
import hashlib
import logging
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import optax

from jaxtta import adapters, assets
from jaxtta.adapters import BATCLIP_PRESETS, TENT_PRESETS, Adapter, TNTConfig
from jaxtta.adapters.mgtta import PAPER_LEARNING_RATE, check_statistics
from jaxtta.models import Classifier, Task, load_statistics, zero_shot_task
from jaxtta.models.task import Tokenized
from jaxtta.optim import load_mgg, meta_gradient_generator
from jaxtta.tree import normalisation_parameters

log = logging.getLogger(__name__)

ADAPTERS = ("zero_shot", "tent", "batclip", "tnt", "mgtta", "mgtta-sgd", "mgtta-adam")
"""Names for `make_adapter`; "tnt-3" is TNT with three steps, and adapters with a learning rate
take it after an @: "tent@1e-4"."""
WITH_RATE = ("tent", "batclip", "mgtta", "mgtta-sgd", "mgtta-adam")
"""Adapters with a learning rate."""


@dataclasses.dataclass(frozen=True)
class MGTTAConfig:
    """MGTTA's settings.

    Attributes:
        phi: file with the generator's weights, from pretrain_mgg.py.
        statistics: file with the statistics of clean images' features, from pretrain_mgg.py.
        weight: weight of the discrepancy.
        tower: image, or both to adapt the text tower too.
    """

    phi: Path = assets.PHI
    statistics: Path = assets.STATISTICS
    weight: float = 0.4
    tower: Literal["image", "both"] = "image"

    def __post_init__(self) -> None:
        """Validate the settings."""
        if not self.weight >= 0:
            raise ValueError(f"weight is {self.weight}, expected at least 0")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Settings of all adapters.

    Attributes:
        preset: optimiser settings of TENT and BATCLIP, from the papers.
        tnt: TNT's settings.
        mgtta: MGTTAConfig's settings.
    """

    preset: str
    tnt: TNTConfig
    mgtta: MGTTAConfig


def check_adapters(names: tuple[str, ...]) -> None:
    """Raise a ValueError for an unknown adapter name."""
    for name in names:
        base, at, _ = name.partition("@")
        if at and base in WITH_RATE and 0 < (rate_in(name) or 0) < math.inf:
            continue
        if at or (base not in ADAPTERS and not re.fullmatch(r"tnt-\d+", base)):
            raise ValueError(
                f"unknown adapter {name!r}, expected one of {', '.join(ADAPTERS)} (or tnt-STEPS, "
                "or with a learning rate: tent@RATE)"
            )


def rate_in(name: str) -> float | None:
    """The learning rate in a name, or None."""
    try:
        return float(name.partition("@")[2])
    except ValueError:
        return None


def has_rate(name: str) -> bool:
    """Whether an adapter has a learning rate that is not in its name."""
    return name in WITH_RATE


def is_tnt(name: str) -> bool:
    """Whether an adapter makes its own views and needs full-size images."""
    return name.partition("-")[0] == "tnt"


def tnt_config_of(name: str, tuning: TNTConfig) -> TNTConfig:
    """TNT's settings, with the number of steps from the name if it has one."""
    steps = name.partition("-")[2]
    return dataclasses.replace(tuning, steps=int(steps)) if steps else tuning


def task_for(
    model: Classifier, class_names: Sequence[str], templates: Sequence[str]
) -> Task | None:
    """The task of a dataset's classes; None for a model that has these classes of its own.

    Args:
        model: the model.
        class_names: the dataset's, in the labels' order.
        templates: of the prompts; not used by a model with its own classes.

    Returns:
        The task, or None.

    Raises:
        ValueError: if the model's own classes are others.
    """
    own = getattr(model, "class_names", None)
    if own is None:
        # Refused there, if it has neither classes of its own nor a text tower.
        return zero_shot_task(cast(Tokenized, model), class_names, templates)
    if len(own) != len(class_names):
        raise ValueError(
            f"the model has {len(own)} classes of its own, the dataset has {len(class_names)}"
        )
    if any(re.fullmatch(r"LABEL_\d+", name) for name in own):
        log.warning("the model does not name its classes: their order is taken to be the dataset's")
        return None
    places: dict[str, set[int]] = {}
    for number, name in enumerate(own):
        for synonym in _synonyms(name):
            places.setdefault(synonym, set()).add(number)
    found = [set().union(*(places.get(s, ()) for s in _synonyms(name))) for name in class_names]
    moved = [number for number, hits in enumerate(found) if hits and number not in hits]
    known = sum(number in hits for number, hits in enumerate(found))
    # ImageNet's names hold a few doubles, and the prompts' names differ from the model's.
    if len(moved) > len(own) // 50 or 2 * known < len(own):
        odd = moved[0] if moved else next(n for n, hits in enumerate(found) if not hits)
        raise ValueError(
            f"the model's classes are not the dataset's, or in another order: class {odd} is "
            f"{own[odd]!r} in the model and {class_names[odd]!r} in the dataset"
        )
    return None


def _synonyms(name: str) -> set[str]:
    """The names that one of ImageNet's class names lists."""
    return {part.strip().lower() for part in name.replace("_", " ").split(",")}


def make_adapter(
    name: str, model: Classifier, task: Task | None, setup: AdapterConfig, rate: float | None = None
) -> Adapter:
    """Make an adapter.

    Args:
        name: one of `ADAPTERS`, "tnt-3" or "tent@1e-4".
        model: the model.
        task: the classes.
        setup: the settings.
        rate: a learning rate for one of `WITH_RATE`, instead of the paper's: TENT with SGD and
            momentum, BATCLIP with AdamW, MGTTA with the optimiser in its name.

    Returns:
        The adapter.

    Raises:
        FileNotFoundError: if one of MGTTA's files is missing.
        ValueError: if a file is invalid, or for a model of another size.
    """
    name, rate = name.partition("@")[0], rate_in(name) or rate
    if name == "zero_shot":
        return adapters.zero_shot(model, task)
    if is_tnt(name):
        return adapters.tnt(model, task, config=tnt_config_of(name, setup.tnt))
    if name.startswith("mgtta"):
        settings = setup.mgtta
        if name == "mgtta":
            phi, _ = load_mgg(settings.phi)
            optimizer = meta_gradient_generator(phi, rate or PAPER_LEARNING_RATE)
        else:
            optimizer = optimizer_of(name, setup, rate)()
        statistics, _ = load_statistics(settings.statistics)
        if model.feature_shape is not None:
            try:
                check_statistics(statistics.mean, model.feature_shape)
            except ValueError as error:
                raise ValueError(f"{settings.statistics}: {error}") from error
        return adapters.mgtta(
            model,
            task,
            optimizer=optimizer,
            trainable=normalisation_parameters(settings.tower),
            statistics=statistics,
            weight=settings.weight,
        )
    method = {"tent": adapters.tent, "batclip": adapters.batclip}[name]
    return method(model, task, optimizer=optimizer_of(name, setup, rate)())


def optimizer_of(name: str, setup: AdapterConfig, rate: float | None) -> partial:
    """The optimiser of an adapter that takes one of optax's."""
    if rate is None and name in ("tent", "batclip"):
        presets = TENT_PRESETS if name == "tent" else BATCLIP_PRESETS
        return presets[setup.preset].optimizer
    rate = PAPER_LEARNING_RATE if rate is None else rate
    return {
        "tent": partial(optax.sgd, rate, momentum=0.9),
        "batclip": partial(optax.adamw, rate, weight_decay=1e-2),
        "mgtta-sgd": partial(optax.sgd, rate, momentum=0.9),
        "mgtta-adam": partial(optax.adam, rate),
    }[name]


def check_mgtta_files(names: tuple[str, ...], mgtta: MGTTAConfig, weights: str) -> None:
    """Check that MGTTA's files were made with this model; only warn about the generator.

    Args:
        names: the adapters' names.
        mgtta: MGTTAConfig's settings.
        weights: fingerprint of the model's weights, from `fingerprints`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is invalid, or the statistics are of other weights.
    """
    bases = {name.partition("@")[0] for name in names}
    made_for = "made with another model; run pretrain_mgg.py to make a file for"
    if bases & {"mgtta", "mgtta-sgd", "mgtta-adam"}:
        _, about = load_statistics(mgtta.statistics)
        if about.get("weights", weights) != weights:
            raise ValueError(f"{mgtta.statistics}: was {made_for} --mgtta.statistics")
    if "mgtta" in bases:
        _, about = load_mgg(mgtta.phi)
        if about.get("weights", weights) != weights:
            log.warning("%s: was %s --mgtta.phi", mgtta.phi, made_for)


def own_settings(
    name: str, setup: AdapterConfig, rate: float | None = None, canvas: int | None = None
) -> dict[str, Any]:
    """The settings that affect only this adapter's results, for its cells."""
    if is_tnt(name):
        settings = dataclasses.asdict(tnt_config_of(name, setup.tnt)) | {"canvas": canvas}
        return {
            "tnt": {
                k: v for k, v in settings.items() if k not in ("views_per_chunk", "images_per_map")
            }
        }
    base, rate = name.partition("@")[0], rate_in(name) or rate
    if base == "zero_shot":
        return {}
    if base == "mgtta":
        rate = rate or PAPER_LEARNING_RATE
        used = f"meta_gradient_generator({rate})"
    else:
        made = optimizer_of(base, setup, rate)
        (rate,) = made.args
        given = [str(rate), *(f"{key}={value}" for key, value in made.keywords.items())]
        used = f"{made.func.__name__}({', '.join(given)})"
    own: dict[str, Any] = {"optimizer": used, "learning_rate": rate}
    if base.startswith("mgtta"):
        settings = setup.mgtta
        files = {"statistics": settings.statistics}
        if base == "mgtta":
            files["phi"] = settings.phi
        digests = {key: _digest(path) for key, path in files.items()}
        own["mgtta"] = {"weight": settings.weight, "tower": settings.tower, **digests}
    return own


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
