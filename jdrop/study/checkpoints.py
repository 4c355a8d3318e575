"""Checkpoints of a training that is under way: atomic, with checksums, for any number of devices.

`checkpoints/PART/EPOCHS/` is an Orbax checkpoint of the arrays of all members. Then
`checkpoints/PART/EPOCHS.json` is written: the log of the training, and a checksum of the log, of
all files of the checkpoint, and of the run and part that they belong to. Without it a checkpoint is
not complete, and Orbax reads no checkpoint whose checksum is wrong. In a program that has called
`jax.distributed.initialize`, processes other than the first store `EPOCHS/arrays.npz` instead.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jdrop.study.atomic_writes import write_text
from jdrop.study.errors import UserError

SECONDS_BETWEEN_CHECKPOINTS = 15.0
"""How often a checkpoint is written, if writing takes at most `WRITING_SHARE` of the time.

A killed training loses at most that, or 33 times what a checkpoint takes to write, whichever is
longer. It also loses one epoch, and the checkpoint that was being written.
"""

WRITING_SHARE = 0.03
"""At most this share of the time is spent on writing: large checkpoints are written less often."""

SECONDS_WORTH_A_CHECKPOINT = 5.0
"""After its last epoch, a training is stored if it would lose at least that."""

NUM_KEPT = 2
"""The checkpoint before the last one is for the case that the last one is damaged."""

ARRAYS = "arrays.npz"
"""The file of a checkpoint that Orbax cannot write."""

_logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that cannot be written."""


class Checkpoints:
    """The last states of one training.

    Args:
        folder: of this training alone.
        identity: a hash of all that the training depends on; checkpoints of others are refused.
        num_members: how many networks are stored. The arrays have a leading axis of at least as
            many networks; how many more depends on the number of devices.
    """

    def __init__(self, folder: Path, identity: str, num_members: int) -> None:
        self._folder, self._identity, self._num_members = folder, identity, num_members
        self._last_save, self._writing_seconds = time.perf_counter(), 0.0

    @contextmanager
    def saving(self) -> Iterator[Callable[[int, Any, dict[str, Any]], None]]:
        """Yields `update(epochs, state, log)`, to be called after each epoch.

        From time to time, `update` copies the state to the host, and a thread writes it while the
        training goes on. On a KeyboardInterrupt and after the last epoch, the block waits for that
        thread, and saves the last state. Arrays of the host must not change in place.

        Raises:
            CheckpointError: as `save` does, at the first call after the thread failed.
        """
        latest: tuple[int, Any, dict[str, Any]] | None = None
        writing: Future[float] | None = None

        def update(epochs: int, state: Any, log: dict[str, Any]) -> None:
            nonlocal latest
            latest = epochs, state, log
            if writing is not None and writing.done():
                wait()
            if writing is None and self._is_due(SECONDS_BETWEEN_CHECKPOINTS):
                write()

        def write() -> None:
            nonlocal latest, writing
            if latest is not None:
                epochs, state, log = latest
                # A whole checkpoint of our own in one thread, instead of an asynchronous one of
                # Orbax: its JSON must follow it, and no two may be written at once.
                writing = writer.submit(self._timed_save, epochs, self._on_host(state), log)
                self._last_save, latest = time.perf_counter(), None

        def wait() -> None:
            nonlocal writing
            if writing is not None:
                self._writing_seconds = writing.result()
                writing = None

        # At its end, the block waits for the thread, whatever was raised.
        with ThreadPoolExecutor(1, "checkpoint") as writer:
            try:
                yield update
                wait()
                if self._is_due(SECONDS_WORTH_A_CHECKPOINT):
                    write()
                    wait()
            except KeyboardInterrupt:
                wait()
                write()
                wait()
                raise

    def _is_due(self, seconds: float) -> bool:
        """Whether a checkpoint is due that may be written every so many seconds."""
        seconds = max(seconds, self._writing_seconds / WRITING_SHARE)
        return time.perf_counter() - self._last_save >= seconds

    def _timed_save(self, epochs: int, state: Any, log: dict[str, Any]) -> float:
        """Saves, and returns how many seconds it took."""
        begin = time.perf_counter()
        self.save(epochs, state, log)
        return time.perf_counter() - begin

    def save(self, epochs: int, state: Any, log: dict[str, Any]) -> None:
        """Writes a checkpoint, then removes all but the last `NUM_KEPT`.

        Args:
            epochs: after which this is the state.
            state: a pytree of arrays, each with a leading axis of networks.
            log: as JSON holds it.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be written.
        """
        state = self._on_host(state)
        path = self._folder / str(epochs)
        try:
            _remove(path)  # A kill may have left it without its JSON.
            if jax.process_index():
                # Orbax writes no array that one process alone holds, except in process 0.
                path.mkdir(parents=True)
                np.savez(path / ARRAYS, *jax.tree.leaves(state))
            else:
                with _checkpointer() as checkpointer:
                    checkpointer.save(path, args=ocp.args.StandardSave(state))
            log = json.loads(json.dumps(log))
            content = {"log": log, "checksum": self._checksum(path, log)}
            write_text(path.with_suffix(".json"), json.dumps(content))
        except Exception as error:  # Orbax raises a ValueError where the disk is full.
            self._remove_all_but(self._epochs())
            raise CheckpointError(
                f"the checkpoint after {epochs} epochs could not be written to {self._folder} "
                f"({_first_line(error)}); free some space, or make the folder writable. All that "
                "was complete is kept, and the same command goes on from there."
            ) from error
        self._remove_all_but(self._epochs()[-NUM_KEPT:])

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Epochs, state and log of the last checkpoint that is intact; None if there is none.

        Others are set aside, with a warning that says so.

        Args:
            like: a state with arrays of the same shapes, dtypes and devices. Networks that no
                checkpoint holds are taken from it.
        """
        stored = self._on_host(like)
        for epochs in reversed(self._epochs()):
            try:
                state, log = self._read(epochs, stored)
            except Exception as error:  # Orbax may raise anything on damaged files.
                self._set_aside(epochs, _first_line(error))
                continue
            return epochs, jax.tree.map(_with_first_members, like, state), log
        return None

    def delete(self) -> None:
        """Removes all checkpoints: what they were for is stored."""
        _remove(self._folder)

    def _on_host(self, state: Any) -> Any:
        """The networks that are stored, as arrays of NumPy."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[: self._num_members], state)

    def _read(self, epochs: int, like: Any) -> tuple[Any, dict[str, Any]]:
        path = self._folder / str(epochs)
        content = json.loads(path.with_suffix(".json").read_bytes())
        if content["checksum"] != self._checksum(path, content["log"]):
            raise ValueError("it is damaged, of another run or of another version of jdrop")
        if (path / ARRAYS).exists():
            state = _read_arrays(path / ARRAYS, like)
        else:
            with _checkpointer() as checkpointer:
                state = checkpointer.restore(path, args=ocp.args.StandardRestore(like))
        for leaf, other in zip(*map(jax.tree.leaves, (state, like)), strict=True):
            if leaf.shape != other.shape:
                raise ValueError(f"it holds an array of shape {leaf.shape}, not {other.shape}")
        return state, content["log"]

    def _epochs(self) -> list[int]:
        """The epochs of the complete checkpoints, rising."""
        names = (path.stem for path in self._folder.glob("*.json"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _checksum(self, path: Path, log: dict[str, Any]) -> str:
        checksum = hashlib.sha256(json.dumps([self._identity, log], sort_keys=True).encode())
        for file in sorted(path.rglob("*")):
            if file.is_file():
                checksum.update(file.relative_to(path).as_posix().encode())
                checksum.update(hashlib.sha256(file.read_bytes()).digest())
        return checksum.hexdigest()

    def _set_aside(self, epochs: int, reason: str) -> None:
        _logger.warning(
            "The checkpoint %s was not used: %s. The training goes on from the one before, or "
            "begins again.",
            self._folder / str(epochs),
            reason,
        )
        for path in (self._folder / str(epochs), self._folder / f"{epochs}.json"):
            refused = path.with_name(f"{path.name}.refused")
            _remove(refused)
            if path.exists():
                path.rename(refused)

    def _remove_all_but(self, epochs: list[int]) -> None:
        """Removes other checkpoints, and what killed runs have left."""
        kept = {f"{epoch}{suffix}" for epoch in epochs for suffix in ("", ".json")}
        # The JSON first, since it marks a checkpoint as complete.
        for path in sorted(self._folder.glob("*"), key=lambda path: path.is_dir()):
            if path.name not in kept and path.suffix != ".refused":
                _remove(path)


def _read_arrays(path: Path, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    with np.load(path) as arrays:
        # NumPy stores an array of bfloat16 as one of an unknown type of two bytes.
        stored = [arrays[f"arr_{i}"].view(leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, stored)


@contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """Orbax without its log, which shows tracebacks of errors that are told in a sentence here."""
    # Where JAX knows of several processes, each writes checkpoints of its own.
    process = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process-{process}",
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    log = logging.getLogger("absl")
    was_disabled, log.disabled = log.disabled, True
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            yield checkpointer
    finally:
        log.disabled = was_disabled


def _with_first_members(like: Any, members: np.ndarray) -> Any:
    """The array with other first networks, on the same devices."""
    array = np.concatenate([members, np.asarray(like)[len(members) :]])
    return jax.device_put(array, like.sharding) if isinstance(like, jax.Array) else array


def _remove(path: Path) -> None:
    """Removes a file or a folder. A folder is renamed first, so that no part keeps its name."""
    if path.is_file():
        path.unlink()
        return
    doomed = path.with_name(f"{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    if path.exists():
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _first_line(error: Exception) -> str:
    full = os.strerror(errno.ENOSPC)
    if full in str(error):  # Orbax puts long paths before it.
        return full
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")
