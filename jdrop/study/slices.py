"""The networks of one training, divided among the processes of a run.

Networks need no communication, so each process trains a slice of neighbours and stores it in the
run's folder. Process 0 joins the slices. Which processes train does not matter to a slice: a run
that was begun by four processes goes on with any number, which share the slices of the trainings
that were begun.

In cross-validation the slices are stored at the candidate epochs. The processes share the
candidates too: each joins the networks at some, scores them, and stores the scores for all.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdrop.network import Variables
from jdrop.study.errors import RunError
from jdrop.study.locks import POLL_SECONDS
from jdrop.study.run_folder import RunFolder

MAX_POLL_SECONDS = 1.0
"""How often a process looks that has waited for long: the folder's server answers all of them."""


@dataclass(frozen=True)
class NetworkRange:
    """The networks of a slice.

    Attributes:
        start: index of the first network.
        stop: index after the last one.
    """

    start: int
    stop: int

    def __len__(self) -> int:
        """How many networks there are."""
        return self.stop - self.start

    def __str__(self) -> str:
        """As in the name of a file: the first and the last index, or the only one."""
        return f"{self.start}-{self.stop - 1}" if len(self) > 1 else str(self.start)


@dataclass(frozen=True)
class SlicePart:
    """A slice as the folder holds it.

    Attributes:
        leaves: the arrays of the variables, each with a leading axis of networks.
        log: of the training, as JSON holds it.
    """

    leaves: list[Any]
    log: dict[str, Any]


@dataclass(frozen=True)
class ScoresPart:
    """What `jdrop.study.training.Validation.losses` returned at one candidate."""

    scores: Any


class MissingSlicesError(RunError):
    """A process has ended before it stored its slices of a training; the message names them."""


class Slices:
    """How one training is divided, and what is stored of it.

    Args:
        run_folder: holds the slices.
        training: the part that the training is for; `PART/NAME` if the part needs several.
        num_networks: how many networks the training has.
        min_first: how many networks the first slice has at least.

    Attributes:
        part: the part that the training is for.
        num_networks: how many networks the training has.
        ranges: the networks of each slice.
        own: those of the slices of this process.
    """

    def __init__(
        self, run_folder: RunFolder, training: str, num_networks: int, min_first: int
    ) -> None:
        self._run_folder, self._processes = run_folder, run_folder.processes
        self._training, self.num_networks = training, num_networks
        self.part, _, _ = training.partition("/")
        self._num_slices = self._count_slices(num_networks)
        self.ranges = divide(num_networks, self._num_slices, min_first)
        self.own = self.ranges[self._processes.index :: self._processes.count]

    @property
    def is_whole(self) -> bool:
        """Whether a single process trains all networks, and so stores no slices."""
        return len(self.ranges) == 1

    def checkpoint_of(self, networks: NetworkRange) -> str:
        """The name of the checkpoints of a slice."""
        return self._training if self.is_whole else f"{self._training}/{networks}"

    def is_stored(self, networks: NetworkRange, epoch: int | None = None) -> bool:
        """Whether the folder holds a slice.

        Args:
            networks: of the slice.
            epoch: a candidate epoch of cross-validation; None at the end of other trainings.
        """
        return self._run_folder.is_complete(self._name(networks, epoch))

    def store(
        self,
        networks: NetworkRange,
        variables: Any,
        log: dict[str, Any],
        epoch: int | None = None,
    ) -> None:
        """Stores a slice; see `is_stored`."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]
        self._run_folder.store(self._name(networks, epoch), SlicePart(leaves, log))

    def join(self, like: Any, epoch: int | None = None) -> tuple[Any, list[dict[str, Any]]]:
        """Waits for all slices; the variables of all networks, and the logs of the slices.

        Args:
            like: variables of the same structure and dtypes.
            epoch: see `is_stored`.

        Raises:
            MissingSlicesError: processes have ended without their slices.
        """
        self.wait(epoch)
        parts = [
            self._run_folder.require(self._name(networks, epoch), SlicePart)
            for networks in self.ranges
        ]
        leaves, structure = jax.tree.flatten(like)
        joined = [
            # NumPy stores an array of bfloat16 as one of an unknown type of two bytes.
            np.concatenate([array.view(leaf.dtype) for array in arrays])
            for leaf, *arrays in zip(leaves, *(part.leaves for part in parts), strict=True)
        ]
        return jax.tree.unflatten(structure, joined), [part.log for part in parts]

    def wait(self, epoch: int | None = None) -> None:
        """Waits for all slices; see `join`."""
        missing = [
            (process, networks)
            for index, networks in enumerate(self.ranges)
            if not self._wait_for(
                self._name(networks, epoch), process := index % self._processes.count
            )
        ]
        if missing:
            names = (f"{networks} (process {process})" for process, networks in missing)
            raise MissingSlicesError(f"{self._training}: networks {' and '.join(names)}")

    def scores(
        self, epochs: Sequence[int], like: Variables, losses: Callable[[int, Variables], Any]
    ) -> list[Any]:
        """The scores of all networks at candidate epochs, the same in every process.

        Args:
            epochs: candidates, at which all slices of this process are stored.
            like: variables of the same structure and dtypes.
            losses: `losses(epoch, variables)` scores all networks.

        Raises:
            MissingSlicesError: processes have ended without their slices.
        """
        for epoch in epochs:
            self.wait(epoch)
        num_scorers = min(self._processes.count, len(self.ranges))
        scorers = [index % num_scorers for index in range(len(epochs))]
        for epoch, scorer in zip(epochs, scorers, strict=True):
            if scorer == self._processes.index:
                self._store_scores(epoch, like, losses)
        for epoch, scorer in zip(epochs, scorers, strict=True):
            if self._wait_for(self._scores_name(epoch), scorer):
                continue
            # Its process has ended, but the networks are there.
            if self._processes.is_first:
                self._store_scores(epoch, like, losses)
            elif not self._wait_for(self._scores_name(epoch), 0):
                raise MissingSlicesError(f"{self._training}: scores after {epoch} epochs")
        names = map(self._scores_name, epochs)
        return [self._run_folder.require(name, ScoresPart).scores for name in names]

    def _store_scores(
        self, epoch: int, like: Variables, losses: Callable[[int, Variables], Any]
    ) -> None:
        if not self._run_folder.is_complete(self._scores_name(epoch)):
            variables, _ = self.join(like, epoch)
            self._run_folder.store(self._scores_name(epoch), ScoresPart(losses(epoch, variables)))

    def _wait_for(self, name: str, process: int) -> bool:
        return wait_for(self._run_folder, name, process, needed_by=self.part)

    def _count_slices(self, num_networks: int) -> int:
        """Into how many slices the training is divided; all processes find the same.

        A training that was begun stays divided as it is, so that nothing of it is lost.
        """
        folder = slices_folder(self._run_folder, self._training)
        for begun in folder.glob("[0-9]*"):
            if begun.is_dir():
                return int(begun.name)
        count = min(self._processes.count, num_networks)
        # A single process has begun without slices. Those of several have folders of their own.
        checkpoints = self._run_folder.folder / "checkpoints" / self._training
        if count == 1 or any(checkpoints.glob("*.json")):
            return 1
        (folder / str(count)).mkdir(parents=True, exist_ok=True)
        return count

    def _name(self, networks: NetworkRange, epoch: int | None) -> str:
        name = f"slices/{self._training}/{self._num_slices}/{networks}"
        return name if epoch is None else f"{name}-after-{epoch}"

    def _scores_name(self, epoch: int) -> str:
        return f"slices/{self._training}/scores-after-{epoch}"


def divide(num_networks: int, num_slices: int, min_first: int) -> list[NetworkRange]:
    """Slices of neighbours, as equal as they can be.

    Example:
        >>> [str(networks) for networks in divide(10, 4, min_first=1)]
        ['0-2', '3-5', '6-7', '8-9']
        >>> [str(networks) for networks in divide(10, 4, min_first=5)]
        ['0-4', '5-6', '7-8', '9']
    """
    ranges: list[NetworkRange] = []
    start = 0
    for left in range(num_slices, 0, -1):
        size = -(-(num_networks - start) // left)
        if not ranges:
            size = min(max(size, min_first), num_networks)
        if size:
            ranges.append(NetworkRange(start, start + size))
        start += size
    return ranges


def slices_folder(run_folder: RunFolder, training: str) -> Path:
    """Where the slices of a training, or of all trainings of a part, are stored."""
    return run_folder.folder / "parts" / "slices" / training


def delete_slices(run_folder: RunFolder, part: str) -> None:
    """Removes the slices for a part that is stored."""
    shutil.rmtree(slices_folder(run_folder, part), ignore_errors=True)


def wait_for(run_folder: RunFolder, name: str, process: int, needed_by: str = "") -> bool:
    """Waits for a part that a process of the run stores; False if it will not come.

    Args:
        run_folder: of the run.
        name: of the part.
        process: stores the part, unless it ends before.
        needed_by: once this part is there, process 0 may have removed the part that is waited for.

    Raises:
        UserError: a mistake of the user has ended process 0.
    """
    pause = POLL_SECONDS
    while not run_folder.is_complete(name, warn=False):
        if needed_by and run_folder.is_complete(needed_by, warn=False):
            return False
        run_folder.locks.check_first()
        # What it stored last may have come between the two looks.
        if process == run_folder.processes.index or run_folder.locks.has_ended(process):
            run_folder.look_anew(name)
            return run_folder.is_complete(name)
        time.sleep(pause)
        pause = min(1.1 * pause, MAX_POLL_SECONDS)
    return True


def require_all(run_folder: RunFolder, names: Iterable[str]) -> None:
    """Waits for parts that process 0 stores.

    Raises:
        RunError: process 0 has ended without them.
        UserError: a mistake of the user has ended process 0.
    """
    for name in names:
        if not wait_for(run_folder, name, 0):
            raise RunError(
                f"process 0 has ended without the part {name}; this process has stored its slices "
                f"in {run_folder.folder}. Give the same command again: the run goes on from there."
            )
