"""The folder of a run: every finished part is stored at once, so that nothing is computed twice.

Files are written whole or not at all, so a run that is killed at any moment goes on from here.

| file | holds |
|---|---|
| `run.json` | what the run is: its settings, hashes of data and model, and `format`, the version of this layout |
| `parts/data.*` | a `DataPart` |
| `parts/GROUP.*` | a `NetworksPart` for each group of networks in `jdrop.study.methods.METHODS` |
| `parts/tuning-GROUP.json` | a `TuningPart` for each of these groups that cross-validation chose settings for |
| `parts/baselines.*` | a `BaselinesPart` |
| `parts/overfitting-METHOD-SIZE.*` | a `SubsetPredictions` for each method and training size |
| `parts/exact.*` | an `ExactPart` |
| `parts/sweep-INDEX.*` | a `SweepCell` for each combination of swept values |
| `parts/summary.json` | a `SummaryPart`, written last |
| `checkpoints/NAME/` | checkpoints of the trainings for a part; see `jdrop.study.checkpoints` |
| `metrics.jsonl`, `metrics-INDEX.jsonl` | losses and scores of every epoch in process 0 and in the others; see `jdrop.study.metric_streams` |
| `tensorboard/` | the same for TensorBoard, if it was asked for |
| `lock` | which process runs or ran here; the process locks this file |
| `lock-INDEX` | the same of each other process, where several share the run |
| `parts/slices/` | trained networks that several processes have stored for each other; see `jdrop.study.slices`. Losses of left-out examples until a choice is made; see `jdrop.study.resampled_choices` |

A part is a dataclass. `NAME.json` holds its fields; where a field is an array, it holds
`{"array": KEY, "shape": [...], "dtype": "..."}` and `NAME.npz` holds the array under that key. The
key is the path of the field, as in `methods/monte-carlo/0/outputs`. A part without arrays has no
`.npz`. `jdrop.study.parts` says the shape and dtype of every array. `checksum` in the JSON is a hash
of the run's configuration, the name of the part, the fields and the `.npz`. So a part that is damaged
or of another run is found.
"""  # noqa: E501

import contextlib
import dataclasses
import hashlib
import json
import logging
import platform
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import pydantic

from jdrop.study.atomic_writes import replacing, write_text
from jdrop.study.checkpoints import Checkpoints
from jdrop.study.errors import RunError
from jdrop.study.locks import POLL_SECONDS, START_SECONDS, Locks
from jdrop.study.processes import Processes

FORMAT = 3
"""The version of the layout; a change that older versions of jdrop cannot read increases it."""

PartType = TypeVar("PartType")

_logger = logging.getLogger(__name__)


class _DamagedError(Exception):
    """A part that is not as it was stored; the message is a sentence."""


class RunFolder:
    """A run in its folder, new or continued.

    Args:
        folder: made if it does not exist.
        run_config: everything that the run's numbers depend on, as values that JSON holds. The
            folder of another run is refused.
        processes: that share the run. The first one makes the folder, the others wait for it.

    Attributes:
        locks: of the processes.

    Raises:
        RunError: the folder holds another run, one of another format, or parts without `run.json`;
            process 0 makes no folder that this process sees.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, run_config: Mapping[str, Any], processes: Processes | None = None
    ) -> None:
        self.folder = folder
        self.run_config = json.loads(json.dumps(run_config))
        self.processes = processes or Processes()
        self.locks = Locks(folder, self.processes)
        self._intact: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        if (folder / "parts").exists() and not path.exists():
            raise RunError(
                f"{folder} holds parts of a run, but no run.json that says which; take another "
                "folder, or delete this one."
            )
        if not self.processes.is_first:
            _wait_for_file(path)
        if not path.exists():
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

    def locked(self) -> AbstractContextManager[None]:
        """No other run works in this folder meanwhile; see `jdrop.study.locks.Locks.locked`.

        Raises:
            RunError: another run is at work in the folder.
        """
        return self.locks.locked()

    def describe_progress(self) -> str:
        """Which parts and checkpoints the folder holds, for a run that is stopped."""
        parts = [path.stem for path in _by_time(self.folder.glob("parts/*.json"))]
        kept = [f"complete: {', '.join(parts)}"] if parts else []
        for path in _by_time(self.folder.glob("checkpoints/**/*.json")):
            training = path.parent.relative_to(self.folder / "checkpoints").as_posix()
            kept.append(f"{training} after {path.stem} epochs")
        return "; ".join(kept) or "nothing yet"

    def is_complete(self, name: str, *, warn: bool = True) -> bool:
        """Whether a part is complete and intact; unless `warn` is False, a warning says so if not.

        Raises:
            RunError: a file cannot be read.
        """
        path = self._json_path(name)
        if not path.exists():
            return False
        # Processes look for the slices of others again and again.
        files = _stamp(path), _stamp(path.with_suffix(".npz"))
        if self._intact.get(name) == files:
            return True
        try:
            self._read_fields(name)
        except _DamagedError as error:
            if warn:
                _logger.warning("%s It is computed again now.", error)
            return False
        self._intact[name] = files
        return True

    def look_anew(self, name: str) -> None:
        """Makes a network file system ask its server whether a part is there.

        Its client remembers for a while which files a folder lacks, until it makes one there.
        """
        with (
            contextlib.suppress(OSError),
            tempfile.NamedTemporaryFile(dir=self._json_path(name).parent),
        ):
            pass

    def load(self, name: str, part_type: type[PartType]) -> PartType | None:
        """A part; None if it is not complete.

        Raises:
            RunError: a file is damaged, is of another run, or cannot be read.
        """
        if not self._json_path(name).exists():
            return None
        try:
            fields, arrays = self._read(name)
            return _adapter(part_type).validate_python(_insert_arrays(fields, arrays))
        except (_DamagedError, pydantic.ValidationError) as error:
            raise RunError(
                f"{error} Give the command that began the run again: it computes the part again."
            ) from error

    def require(self, name: str, part_type: type[PartType]) -> PartType:
        """A part that must be complete.

        Raises:
            RunError: as `load` does, and if the part is not complete.
        """
        self.check_has([name])
        part = self.load(name, part_type)
        assert part is not None
        return part

    def check_has(self, names: Iterable[str]) -> None:
        """Raises if a part is not there.

        Raises:
            RunError: the message names the first such part.
        """
        for name in names:
            if not self._json_path(name).exists():
                raise RunError(
                    f"{self.folder} holds no complete run: the part {name!r} is missing. Give the "
                    "command that began the run again, and the run goes on."
                )

    def store(self, name: str, part: Any) -> None:
        """Writes a part; its JSON last, since that marks the part as complete."""
        path = self._json_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # Of a damaged part: its arrays are about to change.
        arrays: dict[str, Any] = {}
        fields = json.loads(json.dumps(_extract_arrays(part, "", arrays)))
        arrays_path = path.with_suffix(".npz")
        if arrays:
            with replacing(arrays_path) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
        else:
            arrays_path.unlink(missing_ok=True)
        checksum = self._checksum(name, fields, _file_hash(arrays_path) if arrays else None)
        write_text(path, json.dumps({**fields, "checksum": checksum}, indent=1) + "\n")

    def checkpoints(self, name: str, num_members: int = 0) -> Checkpoints:
        """The checkpoints of a training that is under way.

        Args:
            name: of the part that the training is for; `PART/NAME` if it is for several trainings.
            num_members: how many networks the training has.
        """
        identity = self._checksum(name, {"jdrop": version("jdrop")}, None)
        return Checkpoints(self.folder.absolute() / "checkpoints" / name, identity, num_members)

    def _read(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The fields and the arrays of a part that is intact."""
        fields = self._read_fields(name)
        arrays_path = self._json_path(name).with_suffix(".npz")
        if not arrays_path.exists():
            return fields, {}
        with np.load(arrays_path, allow_pickle=False) as archive:
            return fields, {key: archive[key] for key in archive.files}

    def _read_fields(self, name: str) -> dict[str, Any]:
        """The fields of a part. Raises if the part is not intact."""
        path = self._json_path(name)
        arrays_path = path.with_suffix(".npz")
        fields = _read_json(path)
        checksum = fields.pop("checksum", None)
        arrays_hash = _file_hash(arrays_path) if arrays_path.exists() else None
        if checksum != self._checksum(name, fields, arrays_hash):
            raise _DamagedError(
                f"{path} or its .npz is damaged, or of another run: the checksum is wrong."
            )
        return fields

    def _checksum(self, name: str, fields: Mapping[str, Any], arrays_hash: str | None) -> str:
        """A hash of a part, and of the run that it belongs to."""
        values = json.dumps([FORMAT, self.run_config, name, fields, arrays_hash], sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()

    def _json_path(self, name: str) -> Path:
        return self.folder / "parts" / f"{name}.json"


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


def _insert_arrays(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Reverses `_extract_arrays`."""
    if isinstance(value, list):
        return [_insert_arrays(child, arrays) for child in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"array", "shape", "dtype"}:
        return arrays[value["array"]]
    return {name: _insert_arrays(child, arrays) for name, child in value.items()}


_adapters: dict[Any, Any] = {}


def _adapter(part_type: Any) -> Any:
    """What checks the fields of a part. It is kept: making one takes as long as reading a part."""
    if part_type not in _adapters:
        _adapters[part_type] = pydantic.TypeAdapter(part_type)
    return _adapters[part_type]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What is another after a file was written; None without the file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_run_config(path: Path) -> dict[str, Any]:
    """What `run.json` says of the run, without its format, which must be this version's."""
    try:
        run_config = _read_json(path)
    except _DamagedError as error:
        raise RunError(
            f"{path} is damaged, so nothing says which run the folder holds; delete the whole "
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
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"{path} is damaged: {error}.") from error
    if not isinstance(values, dict):
        raise _DamagedError(f"{path} is damaged: it must hold an object.")
    return values


def _wait_for_file(path: Path) -> None:
    """Waits until process 0 has written a file. Raises if it does not come."""
    deadline = time.monotonic() + START_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise RunError(
                f"{path} did not come from process 0 within {START_SECONDS:.0f} s; start all "
                "processes with the same command, in a folder on a file system that all of them "
                "see."
            )
        time.sleep(POLL_SECONDS)


def _by_time(paths: Iterable[Path]) -> list[Path]:
    def changed(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except FileNotFoundError:  # Another process has removed it.
            return 0.0

    return sorted(paths, key=changed)


def _unreadable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path} cannot be read ({error.strerror}); make it readable.")


def versions(num_processes: int = 1) -> dict[str, str]:
    """The versions of jdrop, JAX, Flax, Optax, NumPy and Python; the platform and the devices."""
    devices = jax.local_devices()
    together = f" in each of {num_processes} processes" if num_processes > 1 else ""
    return {
        **{name: version(name) for name in ("jdrop", "jax", "flax", "optax", "numpy")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{len(devices)} x {devices[0].device_kind}{together}",
    }
