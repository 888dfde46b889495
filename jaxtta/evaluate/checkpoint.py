"""Checkpoints for resuming an interrupted stream."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtta.evaluate.record import Record

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one stream with one seed; the newest is kept."""

    def __init__(
        self, folder: Path, every: int | None, identity: str, content: str | None = None
    ) -> None:
        """Set the folder.

        Args:
            folder: for this stream and seed only; created when first needed.
            every: batches between two checkpoints; None for no checkpoints.
            identity: identifies stream and settings; checkpoints with another are ignored.
            content: digest of the stored images, those of other images are ignored; None where they
                are trusted to be the same.
        """
        self.folder = folder
        self.every = every
        self.identity = identity
        self.content = content

    def due(self, batches: int) -> bool:
        """Whether to save after this many batches."""
        return self.every is not None and batches % self.every == 0

    def save(self, batches: int, states: Mapping[str, Any], records: Mapping[str, Record]) -> None:
        """Save all adapters after this many batches of the stream."""
        import orbax.checkpoint as ocp

        names = sorted(states)
        arrays = {
            f"adapter{number}": ocp.args.StandardSave(_arrays(states[name], records[name]))
            for number, name in enumerate(names)
        }
        about = ocp.args.JsonSave(
            {"identity": self.identity, "content": self.content, "adapters": names}
        )
        with _manager(self.folder) as manager:
            manager.save(batches, args=ocp.args.Composite(about=about, **arrays), force=True)

    def restore(self, states: dict[str, Any], records: dict[str, Record]) -> int:
        """Restore states and records from the newest checkpoint.

        A checkpoint with other settings, missing adapters or damaged files is removed.

        Args:
            states: initial states, replaced by the saved ones.
            records: empty, filled.

        Returns:
            The number of finished batches; 0 without a checkpoint.
        """
        if self.every is None or not self.folder.is_dir():
            return 0
        try:
            batches, saved = self._read(states, records)
        except (ValueError, OSError, KeyError, TypeError) as error:
            reason = str(error).partition("\n")[0][:200]
            log.warning("%s: ignored, restarting the stream (%s)", self.folder, reason)
            self.remove()
            return 0
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

    def _read(
        self, states: Mapping[str, Any], records: Mapping[str, Record]
    ) -> tuple[int, dict[str, Any]]:
        import orbax.checkpoint as ocp

        with _manager(self.folder) as manager:
            batches = manager.latest_step()
            if batches is None:
                raise ValueError("nothing saved")
            arguments = ocp.args.Composite(about=ocp.args.JsonRestore())
            about = manager.restore(batches, args=arguments)["about"]
            if about["identity"] != self.identity:
                raise ValueError("another stream or other settings")
            if self.content is not None and about.get("content") != self.content:
                raise ValueError("other images, or not known which")
            if lacking := sorted(set(states) - set(about["adapters"])):
                raise ValueError(f"missing {', '.join(lacking)}")
            places = {name: f"adapter{about['adapters'].index(name)}" for name in states}
            targets = {
                place: ocp.args.StandardRestore(_arrays(states[name], records[name]))
                for name, place in places.items()
            }
            saved = manager.restore(batches, args=ocp.args.Composite(**targets))
        return batches, {name: saved[place] for name, place in places.items()}

    def remove(self) -> None:
        """Delete the checkpoints of a finished stream."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _record(record: Record) -> dict[str, np.ndarray]:
    scores = {f"score_{name}": values for name, values in record.scores._asdict().items()}
    return scores | {"seen": record.seen, "skipped": record.skipped, "seconds": record.seconds}


def _arrays(state: Any, record: Record) -> dict[str, Any]:
    # Leaves by index: a state is any pytree, possibly with empty nodes.
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
    return {"state": leaves, "record": _record(record)}


def save_step(folder: Path, step: int, arrays: dict[str, Any], note: Any) -> None:
    """Save a checkpoint of a run that counts its own steps; the newest is kept.

    Args:
        folder: for this run only; created if missing.
        step: the step number.
        arrays: nested dict of arrays.
        note: any JSON value.
    """
    import orbax.checkpoint as ocp

    arrays = jax.tree.map(np.asarray, arrays)  # host arrays, independent of the device
    arguments = ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays), note=ocp.args.JsonSave({"note": note})
    )
    with _manager(folder) as manager:
        manager.save(step, args=arguments, force=True)


def restore_step(folder: Path) -> tuple[int, dict[str, Any], Any] | None:
    """Restore the last checkpoint of `save_step`: step, arrays and note; None without one.

    Raises:
        ValueError: if it cannot be read.
    """
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        arguments = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(), note=ocp.args.JsonRestore()
        )
        try:
            saved = manager.restore(step, args=arguments)
        except (ValueError, OSError, KeyError, TypeError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise ValueError(
                f"{folder}: cannot be read, remove it to start from the beginning ({reason})"
            ) from error
    return step, saved["arrays"], saved["note"]["note"]


def _manager(folder: Path) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.resolve(), options=options)
