"""The folder of a run: every finished part is stored at once, so that nothing is computed twice.

Files are written whole or not at all, so a run that is killed at any moment goes on from here.

| file | holds |
|---|---|
| `run.json` | what the run is: its settings, hashes of data and model, and `format`, the version of this layout |
| `parts/data.*` | a `DataPart` |
| `parts/GROUP.*` | a `NetworksPart` for each group of networks in `jdrop.study.methods.METHODS` |
| `parts/tuning-GROUP.json` | a `TuningPart` for each of these groups that cross-validation chose settings for |
| `parts/baselines.*` | a `BaselinesPart` |
| `parts/overfitting.*` | an `OverfittingPart` |
| `parts/exact.*` | an `ExactPart` |
| `parts/sweep.*` | a `SweepPart` |
| `parts/summary.json` | a `SummaryPart`, written last |
| `checkpoints/NAME/` | an Orbax checkpoint of a training that is under way |

A part is a dataclass. `NAME.json` holds its fields; where a field is an array, it holds
`{"array": KEY, "shape": [...], "dtype": "..."}` and `NAME.npz` holds the array under that key. The
key is the path of the field, as in `methods/monte-carlo/0/outputs`. A part without arrays has no
`.npz`. `jdrop.study.parts` says the shape and dtype of every array.
"""  # noqa: E501

import dataclasses
import json
import platform
import shutil
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import pydantic

from jdrop.study.atomic_writes import replacing, write_text
from jdrop.study.errors import UserError

FORMAT = 2
"""The version of the layout; a change that older versions of jdrop cannot read increases it."""

PartType = TypeVar("PartType")


class RunError(UserError):
    """A folder that does not hold the run that was asked for, or holds damaged files."""


class RunFolder:
    """A run in its folder, new or continued.

    Args:
        folder: made if it does not exist.
        run_config: everything that the run's numbers depend on, as values that JSON holds. The
            folder of another run is refused.

    Raises:
        RunError: the folder holds another run, one of another format, or parts without `run.json`.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, run_config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run_config = json.loads(json.dumps(run_config))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        if not path.exists():
            if (folder / "parts").exists():
                raise RunError(
                    f"{folder} holds parts of a run, but no run.json that says which; take another "
                    "folder, or delete this one."
                )
            stored = {"format": FORMAT, **self.run_config}
            write_text(path, json.dumps(stored, indent=1) + "\n")
            return
        stored = _read_run_config(path)
        differences = [
            f"{name} is {stored.get(name)!r} there and {self.run_config.get(name)!r} here"
            for name in sorted({*stored, *self.run_config})
            if stored.get(name) != self.run_config.get(name)
        ]
        if differences:
            raise RunError(
                f"{folder} holds another run: {'; '.join(differences)}. Take another folder, or "
                "delete this one."
            )

    @classmethod
    def open(cls, folder: Path) -> "RunFolder":
        """Opens the folder of a run that was begun.

        Raises:
            RunError: the folder holds no run, or one of another format.
        """
        path = folder / "run.json"
        if not path.exists():
            raise RunError(f"{folder} holds no run: there is no run.json in it.")
        return cls(folder, _read_run_config(path))

    def has(self, name: str) -> bool:
        """Whether a part is complete."""
        return self._json_path(name).exists()

    def load(self, name: str, part_type: type[PartType]) -> PartType | None:
        """A part; None if it is not complete.

        Raises:
            RunError: a file is damaged, or lacks a field or an array.
        """
        path = self._json_path(name)
        if not path.exists():
            return None
        fields = _read_json(path)
        arrays_path = path.with_suffix(".npz")
        try:
            # NumPy leaves a damaged file open that it opened itself.
            with arrays_path.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                arrays = {key: archive[key] for key in archive.files}
        except FileNotFoundError:
            arrays = {}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise _damaged(arrays_path, error) from error
        try:
            part = _insert_arrays(fields, arrays, arrays_path)
            return pydantic.TypeAdapter(part_type).validate_python(part)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = "/".join(map(str, first["loc"]))
            raise _damaged(path, f"the field {field}: {first['msg']}") from error

    def require(self, name: str, part_type: type[PartType]) -> PartType:
        """A part that must be complete.

        Raises:
            RunError: as `load` does, and if the part is not complete.
        """
        part = self.load(name, part_type)
        if part is None:
            raise RunError(
                f"{self.folder} holds no complete run: the part {name!r} is missing. Give the "
                "command that began the run again, and the run goes on."
            )
        return part

    def store(self, name: str, part: Any) -> None:
        """Writes a part; its JSON last, since that marks the part as complete."""
        path = self._json_path(name)
        path.parent.mkdir(exist_ok=True)
        arrays: dict[str, Any] = {}
        fields = _extract_arrays(part, "", arrays)
        if arrays:
            with replacing(path.with_suffix(".npz")) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
        write_text(path, json.dumps(fields, indent=1) + "\n")

    def checkpoints(self, name: str) -> "Checkpoints":
        """The checkpoints of a training that is under way."""
        return Checkpoints(self.folder.absolute() / "checkpoints" / name)

    def _json_path(self, name: str) -> Path:
        return self.folder / "parts" / f"{name}.json"


class Checkpoints:
    """The last state of one training: its arrays, and a log that JSON holds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: Any, log: dict[str, Any]) -> None:
        """Writes a checkpoint, then removes the one before it."""
        with self._manager() as manager:
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), log=ocp.args.JsonSave(log)
                ),
            )

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, state and log of the last complete checkpoint; None if there is none.

        Args:
            like: a state with arrays of the same shapes and dtypes.
        """
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
                    state=ocp.args.StandardRestore(abstract), log=ocp.args.JsonRestore()
                ),
            )
            return step, restored["state"], restored["log"]

    def delete(self) -> None:
        """Removes the checkpoints when the training is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _extract_arrays(value: Any, path: str, arrays: dict[str, Any]) -> Any:
    """The value as JSON holds it; its arrays go into `arrays`, under their paths."""
    if isinstance(value, np.ndarray):
        arrays[path] = value
        return {"array": path, "shape": list(value.shape), "dtype": str(value.dtype)}
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        children = value.items()
        return {name: _extract_arrays(child, _join(path, name), arrays) for name, child in children}
    if isinstance(value, list | tuple):
        return [_extract_arrays(child, _join(path, i), arrays) for i, child in enumerate(value)]
    return value


def _join(path: str, name: Any) -> str:
    return f"{path}/{name}" if path else str(name)


def _insert_arrays(value: Any, arrays: Mapping[str, np.ndarray], path: Path) -> Any:
    """Reverses `_extract_arrays`; `path` is that of the arrays, for errors."""
    if isinstance(value, list):
        return [_insert_arrays(child, arrays, path) for child in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"array", "shape", "dtype"}:
        return {name: _insert_arrays(child, arrays, path) for name, child in value.items()}
    array = arrays.get(value["array"])
    if array is None:
        raise _damaged(path, f"it holds no array {value['array']}")
    if list(array.shape) != value["shape"] or str(array.dtype) != value["dtype"]:
        raise _damaged(
            path,
            f"the array {value['array']} is {array.dtype}{list(array.shape)}, not "
            f"{value['dtype']}{value['shape']}",
        )
    return array


def _read_run_config(path: Path) -> dict[str, Any]:
    """What `run.json` says of the run, without its format, which must be this version's."""
    try:
        run_config = _read_json(path)
    except RunError as error:
        raise RunError(
            f"{path} cannot be read, so nothing says which run the folder holds; delete the whole "
            "folder, or take another."
        ) from error
    stored_format = run_config.pop("format", "none")
    if stored_format != FORMAT:
        raise RunError(
            f"{path} is of format {stored_format}, this version of jdrop reads format {FORMAT}. "
            "Take another folder, or the version of jdrop that began the run."
        )
    return run_config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(values, dict):
        raise _damaged(path, "it must hold an object")
    return values


def _damaged(path: Path, reason: object) -> RunError:
    return RunError(
        f"{path} cannot be read ({reason}); delete it and the file of the same name with the "
        "other ending. The command that began the run then computes the part again."
    )


def versions() -> dict[str, str]:
    """The versions of jdrop, JAX, Flax, Optax, NumPy and Python; the platform and the device."""
    device = jax.devices()[0]
    return {
        **{name: version(name) for name in ("jdrop", "jax", "flax", "optax", "numpy")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{jax.device_count()} x {device.device_kind}",
    }
