"""Shared by tests and docstrings' examples: CPU devices, no network, what is compiled is kept."""

import os
from pathlib import Path

# The tests compile much and compute little. What was compiled is kept for the other workers, for
# the scripts that tests start and for the next run (`make clean` forgets it).
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",  # a third of the time to compile
        "--xla_cpu_parallel_codegen_split_count=1",  # each core has a worker
    ]
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / "jax")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # nobody reads them

import json
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import jaxtta


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, cut down to the first block of each tower, which compiles fast."""
    folder = tmp_path_factory.mktemp("short") / "clip"
    shutil.copytree(jaxtta.assets.MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    later = re.compile(r"layers\.[1-9]")
    weights = {name: array for name, array in weights.items() if not later.search(name)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def names_of_examples(short: Path) -> dict[str, Any]:
    """What `jaxtta.load`'s example makes and the others use, of the one-block model."""
    model, params = jaxtta.load(short)
    dataset = jaxtta.data.open_dataset("folder", jaxtta.assets.IMAGES)
    return {
        **{"jax": jax, "jnp": jnp, "np": np, "optax": optax, "jaxtta": jaxtta, "Path": Path},
        **{"model": model, "params": params, "dataset": dataset},
        "task": jaxtta.zero_shot_task(model, dataset.class_names),
        "images": np.stack([dataset[number] for number in range(8)]),
    }


@pytest.fixture(autouse=True)
def _examples(request: pytest.FixtureRequest) -> None:
    """Give docstrings' examples their names, and an empty folder to write to."""
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("doctest_namespace").update(
            request.getfixturevalue("names_of_examples")
        )
        patch = request.getfixturevalue("monkeypatch")
        patch.setattr(jaxtta.assets, "MODEL", request.getfixturevalue("short"))
        patch.chdir(request.getfixturevalue("tmp_path"))
