"""The losses and scores of every network while it trains, for a display, a file and TensorBoard.

`metrics.jsonl` in the folder of a run holds a JSON object on each line, for an epoch of a training:

| field | holds |
|---|---|
| `part` | the part that the networks train for; `PART/NAME` if it needs several trainings, or `PART/FIRST-LAST` for a slice of the networks |
| `epoch` | counted from 1 |
| `seconds` | the time of the epoch, of all networks together |
| `loss` | the mean training loss of each network. Of R replicates, entry `i R + r` is member `i` of replicate `r` |
| `train`, `test` | at the epochs of the learning curve: mean scores of the first members |
| `validation` | in cross-validation, at the candidate epochs: losses on left-out examples by method, setting and size of the average |

A number that is not finite is null. A line is written when its epoch ends, before any checkpoint of
that epoch. A training that goes on from a checkpoint first removes its own lines of later epochs,
since it trains those epochs again. So no epoch of a training is there twice. Nothing reads the file
again: the report does not depend on it.

Of several processes, each writes the epochs of its own networks, process `i > 0` to
`metrics-i.jsonl`. There `loss` holds those of the networks FIRST to LAST, and `validation` is left
out. An epoch that another process has trained again after a restart stands in two files, with the same
losses up to rounding.
"""  # noqa: E501

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jdrop.study.atomic_writes import write_text
from jdrop.study.data import Progress
from jdrop.study.errors import UserError
from jdrop.study.progress import Display


@dataclass(frozen=True)
class EpochMetrics:
    """What a training has measured in an epoch.

    Attributes:
        part: the part that the networks train for, as in the names of checkpoints.
        epoch: counted from 1.
        seconds: the time of the epoch, of all networks together.
        losses: the mean training loss of each network, `[network]`.
        scores: `train`, `test` and `validation`, where the training recorded them in this epoch.
    """

    part: str
    epoch: int
    seconds: float
    losses: np.ndarray
    scores: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The line of `metrics.jsonl` as plain values.

        Example:
            >>> EpochMetrics("plain", 1, 0.5, np.float32([0.1, np.nan])).as_json()
            {'part': 'plain', 'epoch': 1, 'seconds': 0.5, 'loss': [0.1, None]}
        """
        # The shortest text that tells a float32 from its neighbours is a sixth of a float64's.
        losses = [float(str(loss)) for loss in self.losses]
        values = {"part": self.part, "epoch": self.epoch, "seconds": round(self.seconds, 6)}
        return _finite_or_none({**values, "loss": losses, **self.scores})


class MetricStream(ABC):
    """Takes the metrics of a training after each epoch."""

    @abstractmethod
    def begin(self, part: str, epoch: int) -> None:
        """A training begins, or goes on from the checkpoint after `epoch` epochs."""

    @abstractmethod
    def write(self, metrics: EpochMetrics) -> None:
        """An epoch has ended."""


@contextmanager
def open_streams(
    path: Path, progress: Progress, *, tensorboard: bool
) -> Iterator[list[MetricStream]]:
    """Opens the metric streams of a run, and closes them at the end.

    Args:
        path: the file of JSON lines; each process that trains needs one of its own.
        progress: a `Display` shows the losses too.
        tensorboard: whether to write event files into the folder `tensorboard` beside the file.

    Raises:
        UserError: tensorboardX is not installed.
    """
    streams: list[MetricStream] = [JsonLines(path)]
    if isinstance(progress, Display):
        streams.append(ShownLosses(progress))
    if not tensorboard:
        yield streams
        return
    events = TensorBoard(path.parent / "tensorboard")
    try:
        yield [*streams, events]
    finally:
        events.close()


class JsonLines(MetricStream):
    """Appends a line for each epoch to a file; see the head of this module.

    Args:
        path: of the file, which a run that goes on already has.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, part: str, epoch: int) -> None:
        """Removes the lines of later epochs, and a last line that a kill has left unfinished."""
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and not _is_later(line, part, epoch)]
        if len(kept) < len(lines):
            write_text(self._path, "".join(kept))

    def write(self, metrics: EpochMetrics) -> None:
        """Appends the line. Closing the file hands it to the system, so a kill does not lose it."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics.as_json(), allow_nan=False) + "\n")


class ShownLosses(MetricStream):
    """Shows the mean and the range of the last losses beside the progress.

    Args:
        display: shows them with the next step of the progress.
    """

    def __init__(self, display: Display) -> None:
        self._display = display

    def begin(self, part: str, epoch: int) -> None:
        """There is nothing to show yet."""

    def write(self, metrics: EpochMetrics) -> None:
        """Sets the note of the display."""
        self._display.note = describe_losses(metrics.losses)


class TensorBoard(MetricStream):
    """Writes event files for TensorBoard, in a folder for each training.

    The tags are the paths in the line of `metrics.jsonl`, such as `loss/3`, `test/nll` and
    `seconds`; `loss/mean` is the mean of the finite losses.

    Args:
        folder: holds the folders of the trainings.

    Raises:
        UserError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tensorboardX
        except ModuleNotFoundError as error:
            raise UserError(
                "tensorboard needs the package tensorboardX, which is not installed; install it "
                "with `pip install tensorboardX`, or leave tensorboard out: metrics.jsonl holds "
                "the same numbers."
            ) from error
        self._tensorboard, self._folder = tensorboardX, folder
        self._writer: Any = None

    def begin(self, part: str, epoch: int) -> None:
        """Opens the event file. TensorBoard hides the later epochs of earlier files."""
        self.close()
        self._writer = self._tensorboard.SummaryWriter(
            str(self._folder / part), purge_step=epoch + 1
        )

    def write(self, metrics: EpochMetrics) -> None:
        """Writes all numbers of the epoch as one event: an event for each is too slow."""
        summary = self._tensorboard.proto.summary_pb2.Summary()
        values = metrics.as_json()
        del values["part"], values["epoch"]
        values["loss"] = {"mean": _mean(metrics.losses), **_by_index(values["loss"])}
        for tag, number in _flat("", values):
            if number is not None:
                summary.value.add(tag=tag, simple_value=number)
        self._writer.file_writer.add_summary(summary, metrics.epoch)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file, if one is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def describe_losses(losses: np.ndarray) -> str:
    """The mean and the range of the finite losses, and how many are not finite.

    Example:
        >>> describe_losses(np.array([0.25, 0.75]))
        'loss 0.5 (0.25 to 0.75)'
        >>> describe_losses(np.array([0.25, np.nan]))
        'loss 0.25, 1 of 2 not finite'
    """
    finite = losses[np.isfinite(losses)]
    num_left_out = f"{len(losses) - len(finite)} of {len(losses)} not finite"
    if not len(finite):
        return f"loss: {num_left_out}"
    text = f"loss {finite.mean():.3g}"
    if len(finite) > 1:
        text += f" ({finite.min():.3g} to {finite.max():.3g})"
    return text if len(finite) == len(losses) else f"{text}, {num_left_out}"


def _is_later(line: str, part: str, epoch: int) -> bool:
    """Whether a line is of this training and of a later epoch, or damaged."""
    if not line.startswith(f'{{"part": {json.dumps(part)}, '):
        return False
    try:
        return json.loads(line)["epoch"] > epoch
    except (KeyError, TypeError, ValueError):
        return True


def _finite_or_none(value: Any) -> Any:
    """The value as JSON holds it: NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, Mapping):
        return {name: _finite_or_none(child) for name, child in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite_or_none(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _mean(losses: np.ndarray) -> float | None:
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if len(finite) else None


def _by_index(values: Sequence[Any]) -> dict[str, Any]:
    return {str(index): value for index, value in enumerate(values)}


def _flat(path: str, value: Any) -> Iterator[tuple[str, float | None]]:
    """The numbers in nested values, each with its path."""
    if isinstance(value, list):
        value = _by_index(value)
    if not isinstance(value, dict):
        yield path, value
        return
    for name, child in value.items():
        yield from _flat(f"{path}/{name}" if path else name, child)
