"""The folder of a run: what is computed is there at once, and nothing is computed twice.

Log-probabilities are `.npz` files, states in training are Orbax checkpoints, all else is JSON.
Every file is written whole or not at all, so that a run killed at any moment goes on from here.
"""

import hashlib
import json
import platform
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jdrop.study.data import Dataset
from jdrop.study.results import write_text


class RunError(ValueError):
    """A folder that holds something else than the run that was asked for."""


@dataclass(frozen=True)
class Part:
    """A part of a run that is complete.

    Attributes:
        arrays: predictions, by name.
        facts: all else, as plain values.
    """

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


class Run:
    """A run in its folder, new or gone on with.

    Args:
        folder: made if need be.
        about: what the run is, as plain values; a folder goes on with the same only.

    Raises:
        RunError: the folder holds another run.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.about = json.loads(json.dumps(about))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        if not path.exists():
            write_text(path, json.dumps(self.about, indent=1) + "\n")
            return
        found = _read_json(path)
        differing = [
            f"{name} is {found.get(name)!r} there and {self.about.get(name)!r} here"
            for name in sorted({*found, *self.about})
            if found.get(name) != self.about.get(name)
        ]
        if differing:
            raise RunError(
                f"{folder} holds another run: {'; '.join(differing)}. Take another folder, or "
                "delete this one."
            )

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """The run that a folder holds.

        Raises:
            RunError: it holds none.
        """
        path = folder / "run.json"
        if not path.exists():
            raise RunError(f"{folder} holds no run: there is no run.json in it.")
        return cls(folder, _read_json(path))

    def part(self, name: str) -> Part | None:
        """A part that is complete, None if it is not.

        Raises:
            RunError: its files are damaged.
        """
        path = self.folder / "parts" / f"{name}.json"
        if not path.exists():
            return None
        facts = _read_json(path)
        arrays_path = path.with_suffix(".npz")
        try:
            with arrays_path.open("rb") as file:
                found = np.load(file, allow_pickle=False)
                arrays = {key: found[key] for key in found.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise _damaged(arrays_path, error) from error
        return Part(arrays, facts)

    def keep(self, name: str, part: Part) -> None:
        """Writes a part; its JSON last, since that says that it is complete."""
        folder = self.folder / "parts"
        folder.mkdir(exist_ok=True)
        partial = folder / f"{name}.npz.partial"
        with partial.open("wb") as file:
            arrays: dict[str, Any] = part.arrays
            np.savez(file, **arrays)
        partial.replace(folder / f"{name}.npz")
        write_text(folder / f"{name}.json", json.dumps(part.facts, indent=1) + "\n")

    def checkpoints(self, name: str) -> "Checkpoints":
        """The states of a training that is under way."""
        return Checkpoints(self.folder.absolute() / "checkpoints" / name)


class Checkpoints:
    """The last state of one training: arrays, and facts as plain values."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Replaces what was there, which stays until this is complete."""
        with self._manager() as manager:
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts)
                ),
            )

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, state and facts of the last complete save; None if there is none."""
        if not self._folder.exists():
            return None
        with self._manager() as manager:
            step = manager.latest_step()
            if step is None:
                return None
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore()
                ),
            )
            return step, restored["state"], restored["facts"]

    def delete(self) -> None:
        """Removes them: the training is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)


def fingerprint(data: Dataset) -> str:
    """A hash of all examples and labels."""
    digest = hashlib.sha256()
    arrays = (data.train_inputs, data.train_labels, data.test_inputs, data.test_labels)
    for array in (*arrays, *([] if data.ood_inputs is None else [data.ood_inputs])):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} cannot be read ({error}); delete it, and a file of the same name with another "
        "ending beside it, and the command that began the run computes that part again."
    )


def versions() -> dict[str, str]:
    """Of the software, and the device."""
    device = jax.devices()[0]
    return {
        **{name: version(name) for name in ("jdrop", "jax", "flax", "optax", "numpy")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{jax.device_count()} x {device.device_kind}",
    }
