"""Logging results to TensorBoard and Weights & Biases, a line for each adapter and domain."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta.evaluate.predictions import Predictions
from jaxtta.evaluate.provenance import as_json
from jaxtta.evaluate.store import safe_name

Logger = Callable[[Predictions], None]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def loggers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> Logger:
    """Make one function, for `sweep`, that logs a result to each of the trackers.

    Args:
        names: keys of `PACKAGES`.
        folder: of the results; with WANDB_MODE=offline the run can be synchronised from there.
        settings: of the run, shown by Weights & Biases.
    """
    trackers = []
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"unknown tracker {name!r}, expected {', '.join(PACKAGES)}")
        try:
            package = import_module(PACKAGES[name])
        except ImportError as error:
            need = f"--log {name} needs {PACKAGES[name]}: pip install 'jaxtta[log]'"
            raise ImportError(need) from error
        if name == "wandb":
            trackers.append(_wandb(package, folder, settings))
        else:
            trackers.append(_tensorboard(package, folder))

    def log(result: Predictions) -> None:
        for number, domain in enumerate(result.domains):
            rows = result.segment(number).query("seen")
            values = {name: float(np.mean(rows[name])) for name in ("top1", "top5", "nll")}
            values["seconds_per_batch"] = float(np.mean(result.steps["seconds"]))
            for tracker in trackers:
                tracker(result, str(domain), values)

    return log


def _tensorboard(package: Any, folder: Path) -> Callable:
    """One run for each adapter, one tag for each domain and metric; the step is the seed."""
    writers: dict[str, Any] = {}

    def track(result: Predictions, domain: str, values: Mapping[str, float]) -> None:
        if result.adapter not in writers:
            path = folder / "tensorboard" / safe_name(result.adapter)
            writers[result.adapter] = package.SummaryWriter(str(path))
        for name, value in values.items():
            writers[result.adapter].add_scalar(f"{domain}/{name}", value, result.seed)
        writers[result.adapter].flush()

    return track


def _wandb(package: Any, folder: Path, settings: Mapping[str, Any]) -> Callable:
    folder.mkdir(parents=True, exist_ok=True)
    run = package.init(project="jaxtta", dir=str(folder), config=as_json(settings))

    def track(result: Predictions, domain: str, values: Mapping[str, float]) -> None:
        line = {"adapter": result.adapter, "stream": result.stream, "seed": result.seed}
        run.log({**line, "domain": domain, **values})

    return track
