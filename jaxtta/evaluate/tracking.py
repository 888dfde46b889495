"""Logging results to TensorBoard and Weights & Biases, a line for each adapter and domain."""

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxtta.evaluate.predictions import Predictions
from jaxtta.evaluate.store import safe_name
from jaxtta.io import as_json


def loggers(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any]
) -> Callable[[Predictions], None]:
    """Make one function, for `sweep`, that logs a result to tensorboard, wandb or both.

    With WANDB_MODE=offline the run can be synchronised from the folder of the results. Weights &
    Biases shows the settings.
    """
    if "wandb" in names:
        folder.mkdir(parents=True, exist_ok=True)
        package: Any = import_module("wandb")
        run = package.init(project="jaxtta", dir=str(folder), config=as_json(settings))

    @functools.cache
    def writer(adapter: str) -> Any:
        path = folder / "tensorboard" / safe_name(adapter)
        return import_module("tensorboardX").SummaryWriter(str(path))

    def log(result: Predictions) -> None:
        line = {"adapter": result.adapter, "stream": result.stream, "seed": result.seed}
        for number, domain in enumerate(map(str, result.domains)):
            rows = result.segment(number).query("seen")
            values = {name: float(rows[name].mean()) for name in ("top1", "top5", "nll")}
            values["seconds_per_batch"] = float(result.steps["seconds"].mean())
            if "wandb" in names:
                run.log({**line, "domain": domain, **values})
            if "tensorboard" in names:
                for name, value in values.items():
                    writer(result.adapter).add_scalar(f"{domain}/{name}", value, result.seed)
                writer(result.adapter).flush()

    return log
