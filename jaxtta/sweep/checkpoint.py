"""Where a stream stands: adapter states and records, so that a killed run goes on and not back."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtta.sweep.record import Record


class Checkpoints:
    """The checkpoints of one stream with one seed; the newest is kept."""

    def __init__(self, folder: Path, every: int | None) -> None:
        """Choose the folder.

        Args:
            folder: for this stream and seed alone; made when first needed.
            every: batches between two checkpoints; None for none at all.
        """
        self.folder = folder
        self.every = every

    def due(self, batches: int) -> bool:
        """Whether to save after so many batches."""
        return self.every is not None and batches % self.every == 0

    def save(self, batches: int, states: Mapping[str, Any], records: Mapping[str, Record]) -> None:
        """Save all adapters after so many batches of the stream."""
        import orbax.checkpoint as ocp

        with self._manager() as manager:
            arguments = ocp.args.Composite(
                adapters=ocp.args.JsonSave(sorted(states)),
                arrays=ocp.args.StandardSave(_arrays(states, records)),
            )
            manager.save(batches, args=arguments, force=True)

    def restore(self, states: dict[str, Any], records: dict[str, Record]) -> int:
        """Fill states and records from the newest checkpoint, if it is of the same adapters.

        Args:
            states: freshly initialised, replaced by those saved.
            records: empty, filled.

        Returns:
            How many batches were done.
        """
        if self.every is None or not self.folder.is_dir():
            return 0
        import orbax.checkpoint as ocp

        with self._manager() as manager:
            batches = manager.latest_step()
            if batches is None:
                return 0
            saved = manager.restore(
                batches, args=ocp.args.Composite(adapters=ocp.args.JsonRestore())
            )
            if saved["adapters"] != sorted(states):
                return 0
            target = ocp.args.StandardRestore(_arrays(states, records))
            saved = manager.restore(batches, args=ocp.args.Composite(arrays=target))["arrays"]
        for name, state in states.items():
            leaves = saved[name]["state"]
            states[name] = jax.tree.unflatten(
                jax.tree.structure(state), [leaves[str(i)] for i in range(len(leaves))]
            )
            for kept, values in zip(
                jax.tree.leaves(_record(records[name])),
                jax.tree.leaves(saved[name]["record"]),
                strict=True,
            ):
                kept[:] = values
        return batches

    def remove(self) -> None:
        """Forget the stream, once it is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _manager(self) -> Any:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self.folder.resolve(), options=options)


def _record(record: Record) -> dict[str, np.ndarray]:
    scores = {f"score_{name}": values for name, values in record.scores._asdict().items()}
    return scores | {"seen": record.seen, "skipped": record.skipped, "seconds": record.seconds}


def _arrays(states: Mapping[str, Any], records: Mapping[str, Record]) -> dict[str, Any]:
    # Leaves by number: states are any pytree, some of their nodes empty.
    return {
        name: {
            "state": {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))},
            "record": _record(records[name]),
        }
        for name, state in states.items()
    }
