"""What a session is made of, as JSON: a log's header and a bundle's manifest hold it.

setup = Setup("guarded:batclip", ("cat", "dog"), batch_size=8)
session = setup.session(*setup.load())
session.log = AuditLog("log.jsonl", header_of(session, setup))
"""

import dataclasses
import hashlib
import logging
import typing
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtta import adapters, assets, io, models, tree
from jaxtta.adapters.guard import Policy, guarded
from jaxtta.adapters.specs import mgtta_config_of
from jaxtta.deploy.session import Session
from jaxtta.models.settings import model_settings

log = logging.getLogger(__name__)

PACKAGES = ("jaxtta", "jax", "jaxlib", "numpy", "pillow")
_OF_MGTTA = ("phi", "statistics")
_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model, an adapter and the numbers of a session.

    Attributes:
        adapter: name and settings, as `parse_adapter` reads them.
        class_names: one a class, as they are in the prompts.
        templates: of the prompts, with {} for the class.
        model: folder or hub id.
        compute_dtype: of the matrix products.
        remat: whether activations are recomputed, as `jaxtta.load` says.
        scan: whether the blocks are a loop, as there.
        preset: the benchmark whose published settings the adapter has.
        policy: the guard's numbers by name, where they are not the defaults; for guarded adapters.
        batch_size: images per step.
        min_adapt: least images of a batch that an adapter without a guard learns from.
        seed: of what is drawn at random.
        noise: file of a noise map that TNT applies.
        phi: file of MGTTA's generator; None for the adapter's own.
        statistics: file of MGTTA's source statistics; None for the adapter's own.
        fused_attention: whether cuDNN's kernel is used, as `jaxtta.load` says; it is not where JAX
            has no GPU.
    """

    adapter: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)
    model: str = str(assets.MODEL)
    compute_dtype: str = "float32"
    remat: bool = False
    scan: bool = False
    preset: str = "cifar10-c"
    policy: Mapping[str, float] = dataclasses.field(default_factory=dict)
    batch_size: int = 16
    min_adapt: int = 4
    seed: int = 0
    noise: str | None = None
    phi: str | None = None
    statistics: str | None = None
    fused_attention: bool = False

    def __post_init__(self) -> None:
        """Refuse a policy without a guard, a noise map without TNT, and unknown numbers."""
        if self.policy and not self.spec.guard:
            raise ValueError(f"{self.adapter} has no guard, its policy would not be used")
        if self.noise and self.spec.name != "tnt":
            raise ValueError(f"{self.adapter} applies no noise map, tnt does")
        if self.compute_dtype not in _DTYPES:
            raise ValueError(
                f"compute_dtype is {self.compute_dtype!r}, expected {' or '.join(_DTYPES)}"
            )
        policy_of(self.policy)

    @classmethod
    def of(cls, content: Any) -> "Setup":
        """Read what `dataclasses.asdict` gave from JSON; a ValueError if it is something else."""
        try:
            own: dict[str, Any] = {
                name: tuple(map(_text, value)) if isinstance(value, list) else value
                for name, value in content.items()
            }
            for name, kind in typing.get_type_hints(cls).items():
                origin = typing.get_origin(kind)  # of tuple[…] and Mapping[…]
                kind = origin if origin in (tuple, Mapping) else kind
                if name in own and not isinstance(own[name], kind):
                    raise TypeError(f"{name} is {own[name]!r}")
            return cls(**own)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"no settings of a session: {error}") from error

    @property
    def spec(self) -> adapters.AdapterSpec:
        """The adapter that is to be made."""
        spec = adapters.parse_adapter(self.adapter)
        given = {name for name in _OF_MGTTA if getattr(self, name)}
        return spec._replace(settings={k: v for k, v in spec.settings.items() if k not in given})

    @property
    def config(self) -> adapters.AdapterConfig:
        """The settings that the adapter's text does not say."""
        own = {name: Path(path) for name in _OF_MGTTA if (path := getattr(self, name))}
        settings = dataclasses.replace(adapters.MGTTAConfig(), **own)
        return adapters.AdapterConfig(self.preset, mgtta=settings)

    @property
    def files(self) -> dict[str, Path]:
        """The files that the adapter is made of, by the names of their fields."""
        found = {"noise": Path(self.noise)} if self.noise else {}
        if self.spec.name == "mgtta":
            settings = mgtta_config_of(self.spec, self.config)
            found["statistics"] = settings.statistics
            if self.spec.settings.get("optimizer", "mgg") == "mgg":
                found["phi"] = settings.phi
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a state to go on."""
        names = ("adapter", "preset", "policy", "compute_dtype", "seed")
        return {name: getattr(self, name) for name in names}

    def load(self) -> tuple[Any, models.Params]:
        """The model and its parameters."""
        more: dict[str, Any] = {"remat": self.remat, "scan": self.scan}
        more["fused_attention"] = self.fused_attention and jax.default_backend() == "gpu"
        if more["fused_attention"] != self.fused_attention:
            log.warning("fused attention is off: JAX has no GPU here")
        return models.load(self.model, compute_dtype=jnp.dtype(self.compute_dtype), **more)

    def make(self, model: Any, params: Any) -> tuple[models.Task | None, adapters.Adapter]:
        """The task and the adapter; a ValueError for a model that they do not fit."""
        task, spec = models.task_for(model, self.class_names, self.templates), self.spec
        weights = io.digest_leaves(params)
        inner = spec._replace(guard=False)
        if self.noise:
            noise: Any = adapters.load_noise(self.noise)[0]
            settings = adapters.tnt_config_of(inner, self.config)
            adapter = adapters.tnt(model, task, config=settings, noise=noise)
        else:
            adapter = adapters.make_adapter(inner, model, task, self.config, weights)
        if spec.guard:
            reference = adapters.zero_shot(model, task)
            adapter = guarded(adapter, reference, policy_of(self.policy))
        return task, adapter

    def session(self, model: Any, params: Any, **more: Any) -> Session:
        """A new stream.

        Args:
            model: from `load`.
            params: from there too.
            more: other arguments of a `Session`.
        """
        task, adapter = self.make(model, params)
        given = {
            "batch_size": self.batch_size,
            # TNT takes images one by one: no batch is too small for it.
            "min_adapt": 1 if self.spec.name == "tnt" else self.min_adapt,
            "full_size": self.spec.needs_originals,
            "class_names": self.class_names,
            "settings": self.identity,
            "about": dataclasses.asdict(self),
            "digests": True,
            "key": jax.random.key(self.seed),
        }
        return Session(model, params, task, adapter, **given | more)


def state_of(path: str | Path, model: str | None = None) -> tuple[Setup, Session]:
    """The settings that a session's file was saved with, and the session that goes on from it.

    Args:
        path: what `Session.save` wrote, of a session that a `Setup` made.
        model: where the model is now, if its folder has moved.

    Raises:
        FileNotFoundError: if there is no such file or model.
        ValueError: if it is no such file, or the state does not fit the model.
    """
    note = io.load_arrays(path)[1].get("note")
    with io.error_context(path):
        setup = Setup.of(note.get("about") if isinstance(note, dict) else None)
    setup = dataclasses.replace(setup, model=model) if model else setup
    session = setup.session(*setup.load())
    session.load(path)
    return setup, session


def policy_of(numbers: Mapping[str, Any]) -> Policy:
    """A guard's policy from its numbers by name; a ValueError for an unknown or wrong one."""
    if unknown := sorted(numbers.keys() - {field.name for field in dataclasses.fields(Policy)}):
        raise ValueError(f"a guard's policy has no number {unknown[0]}")
    return Policy(**numbers)


def header_of(session: Session, setup: Setup) -> dict[str, Any]:
    """A log's header, of a session that is about to begin or to go on.

    Args:
        session: with the state that it begins with.
        setup: what it was made of.

    Returns:
        JSON: setup; all numbers of the guard's policy, defaults too, or None; digests of the model,
        of the adapter's files and of the state; the counters; versions and device, which a
        difference in a replay may be due to.
    """
    guard = setup.spec.guard
    return {
        "setup": dataclasses.asdict(setup),
        "policy": dataclasses.asdict(policy_of(setup.policy)) if guard else None,
        "model": fingerprint_of(session.model, session.params),
        "files": {name: sha256_of(path) for name, path in setup.files.items()},
        "versions": {name: version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
        **counters_of(session),
    }


def counters_of(session: Session) -> dict[str, Any]:
    """Where a session stands: the state's digest, and its counters."""
    counts = {name: getattr(session, name) for name in ("steps", "seen", "updates")}
    return {"state_digest": digest_of_state(session.state), **counts}


def digest_of_state(state: Any) -> str:
    """The checksum of a state that the log has of it after each step."""
    return f"{int(tree.fingerprint(state)):08x}"


def fingerprint_of(model: Any, params: Any) -> dict[str, str]:
    """Digests of a model's weights, and of its architecture and preprocessing."""
    return {"weights": io.digest_leaves(params), "settings": io.digest_of(model_settings(model))}


def sha256_of(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
