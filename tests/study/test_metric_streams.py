"""Losses and scores of every network while it trains: the file, the display, TensorBoard."""

import io
import json
import struct
import sys

import jax
import numpy as np
import optax
import pytest
from rich.console import Console
from rich.text import Text
from tensorboardX.proto.event_pb2 import Event, SessionLog

import jdrop
from jdrop.study import checkpoints
from jdrop.study.data import Dataset
from jdrop.study.errors import UserError
from jdrop.study.metric_streams import (
    EpochMetrics,
    JsonLines,
    TensorBoard,
    describe_losses,
    open_streams,
)
from jdrop.study.models import MLP, Model
from jdrop.study.processes import Processes
from jdrop.study.progress import with_progress
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings
from jdrop.study.training import NetworkSpec, Trainer, Validation

SETTINGS = Settings(replicates=2, batch_size=10)
DROPOUT = Model(lambda: MLP((4,), 3)).dropout
ADAM = optax.adam(0.01)
ALONE = Processes()


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(50, 5)).astype(np.float32)
    labels = (np.argmax(inputs[:, :3], 1)).astype(np.int32)
    return Dataset("noise", inputs[:40], labels[:40], inputs[40:], labels[40:], 3)


def train(
    folder,
    data,
    streams,
    *,
    members=2,
    progress=lambda *call: None,
    validation=None,
    processes=ALONE,
):
    trainer = Trainer(RunFolder(folder, {}, processes), SETTINGS, progress, streams)
    spec = NetworkSpec(DROPOUT, members, 4, ADAM, record=True)
    return trainer.fit_networks(
        jax.random.key(0),
        spec,
        data,
        checkpoint="sweep-0/plain",
        description="networks",
        validation=validation,
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_epoch_has_a_line_with_the_losses_and_the_recorded_scores(tmp_path, data):
    path = tmp_path / "metrics.jsonl"
    trained = train(tmp_path / "run", data, [JsonLines(path)])
    lines = read(path)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert {line["part"] for line in lines} == {"sweep-0/plain"}
    assert sum(line["seconds"] for line in lines) == pytest.approx(
        trained.log.train_seconds, abs=1e-5
    )
    curve = trained.log.learning_curve
    assert [line["test"]["nll"] for line in lines] == curve.test["nll"]
    assert [line["train"]["error"] for line in lines] == curve.train["error"]


@pytest.mark.slow
def test_the_loss_of_a_network_is_its_own(tmp_path, data):
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    train(tmp_path / "few", data, [JsonLines(few)], members=1)
    train(tmp_path / "many", data, [JsonLines(many)], members=3)
    for line, other in zip(read(few), read(many), strict=True):
        assert len(line["loss"]) == 2
        assert len({*other["loss"]}) == 6
        np.testing.assert_allclose(line["loss"], other["loss"][:2], rtol=1e-5)


def test_a_process_writes_the_losses_of_its_slice(tmp_path, data):
    whole, second = tmp_path / "whole.jsonl", tmp_path / "second.jsonl"
    train(tmp_path / "whole", data, [JsonLines(whole)])
    RunFolder(tmp_path / "two", {}, Processes(0, 2))  # Process 0 makes the folder.
    train(tmp_path / "two", data, [JsonLines(second)], processes=Processes(1, 2))
    for line, other in zip(read(second), read(whole), strict=True):
        assert line["part"] == "sweep-0/plain/2-3"
        np.testing.assert_allclose(line["loss"], other["loss"][2:], rtol=1e-5)
        assert "test" not in line


def test_scores_of_a_cross_validation_are_in_the_line_of_their_epoch(tmp_path, data):
    path = tmp_path / "metrics.jsonl"
    validation = Validation(
        rows=lambda epoch: np.tile(np.arange(40), (4, 1)),
        epochs=(1, 3),
        losses=lambda epoch, variables: {"dropout": [[0.5, 0.25]]},
        is_enough=lambda scores: False,
    )
    train(tmp_path / "run", data, [JsonLines(path)], validation=validation)
    found = [(line["epoch"], line.get("validation")) for line in read(path)]
    assert found == [(1, {"dropout": [[0.5, 0.25]]}), (2, None), (3, {"dropout": [[0.5, 0.25]]})]


class KilledError(Exception):
    pass


@pytest.mark.slow
def test_a_training_that_goes_on_has_each_epoch_once(tmp_path, data, monkeypatch):
    """It is killed after the line of epoch 3, before the checkpoint of that epoch."""
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    train(tmp_path / "whole", data, [JsonLines(whole)])
    monkeypatch.setattr(checkpoints, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(checkpoints, "WRITING_SHARE", np.inf)

    class Killer(JsonLines):
        def write(self, metrics):
            super().write(metrics)
            if metrics.epoch == 3:
                raise KilledError

    JsonLines(parts).write(EpochMetrics("plain", 9, 1.0, np.float32([1])))
    with pytest.raises(KilledError):
        train(tmp_path / "parts", data, [Killer(parts)])
    assert [line["epoch"] for line in read(parts)] == [9, 1, 2, 3]
    with parts.open("a") as file:
        file.write('{"part": "sweep-0/plain", "epoch": 4, "lo')
    first_epoch = []
    train(
        tmp_path / "parts",
        data,
        [JsonLines(parts)],
        progress=lambda what, done, total: what.startswith("training") and first_epoch.append(done),
    )
    # A thread may still have been writing the checkpoint of epoch 1 when epoch 2 ended.
    assert first_epoch[0] in (2, 3)
    other, *lines = read(parts)
    assert (other["part"], other["epoch"]) == ("plain", 9)
    assert [(line["epoch"], line["loss"]) for line in lines] == [
        (line["epoch"], line["loss"]) for line in read(whole)
    ]


def test_a_training_that_begins_again_replaces_its_lines(tmp_path):
    stream = JsonLines(tmp_path / "metrics.jsonl")
    for part in ("plain", "plain/other"):
        stream.begin(part, 0)
        stream.write(EpochMetrics(part, 1, 1.0, np.float32([1])))
    stream.begin("plain", 0)
    assert [line["part"] for line in read(tmp_path / "metrics.jsonl")] == ["plain/other"]


def test_losses_are_written_without_rounding_and_nan_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    losses = np.random.default_rng(0).normal(size=100).astype(np.float32)
    scores = {"test": {"nll": float("inf")}}
    JsonLines(path).write(EpochMetrics("plain", 1, 1.0, np.append(losses, np.nan), scores))
    (line,) = read(path)
    np.testing.assert_array_equal(np.float32(line["loss"][:-1]), losses)
    assert line["loss"][-1] is None
    assert line["test"] == {"nll": None}


def show(tmp_path, console):
    """An epoch of three networks on a console; the second step has no note."""

    def work(display):
        with open_streams(tmp_path / "metrics.jsonl", display, tensorboard=False) as streams:
            losses = np.float32([0.25, 0.75, np.nan])
            for stream in streams:
                stream.begin("plain", 0)
                stream.write(EpochMetrics("plain", 1, 1.0, losses))
            display("training plain networks", 1, 2)
            display("training plain networks", 2, 2)

    with_progress(work, console)
    return console.file.getvalue()


def test_lines_show_the_losses_of_their_epoch(tmp_path):
    printed = show(tmp_path, Console(file=io.StringIO(), width=100))
    assert printed.splitlines() == [
        "training plain networks: 1/2, loss 0.5 (0.25 to 0.75), 1 of 3 not finite",
        "training plain networks: 2/2",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_of_a_training_stays_on_one_line(tmp_path, width):
    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, legacy_windows=False, _environ={}
    )

    def work(display):
        display.note = describe_losses(np.float32([0.25, 0.75]))
        display("training dropout-thinned networks, cross-validation", 1, 100)

    with_progress(work, console)
    last = [line for line in console.file.getvalue().splitlines() if "training" in line][-1]
    assert "1/100" in last
    assert ("loss 0.5" if width == 80 else "loss 0.5 (0.25 to 0.75)") in last
    assert len(Text.from_ansi(last).plain) <= width


def test_without_finite_losses_there_is_no_mean():
    assert describe_losses(np.float32([np.nan, np.inf])) == "loss: 2 of 2 not finite"


def read_events(folder):
    """All events of a folder: records of a length, its checksum, the event, its checksum."""
    events = []
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_tensorboard_has_the_numbers_of_the_lines(tmp_path):
    stream = TensorBoard(tmp_path)
    stream.begin("sweep-0/plain", 2)
    scores = {"validation": {"plain": [[0.5, 0.125]]}}
    stream.write(EpochMetrics("sweep-0/plain", 3, 2.0, np.float32([0.25, 0.75, np.nan]), scores))
    stream.close()
    events = read_events(tmp_path / "sweep-0" / "plain")
    (start,) = [event for event in events if event.HasField("session_log")]
    # TensorBoard hides what earlier files hold from this epoch on.
    assert (start.session_log.status, start.step) == (SessionLog.START, 3)
    (event,) = [event for event in events if event.HasField("summary")]
    assert event.step == 3
    assert {value.tag: value.simple_value for value in event.summary.value} == {
        "seconds": 2.0,
        "loss/mean": 0.5,
        "loss/0": 0.25,
        "loss/1": 0.75,
        "validation/plain/0/0": 0.5,
        "validation/plain/0/1": 0.125,
    }


def test_tensorboard_is_beside_the_lines_if_it_is_asked_for(tmp_path, data):
    with open_streams(tmp_path / "metrics.jsonl", print, tensorboard=True) as streams:
        train(tmp_path / "run", data, streams)
    events = read_events(tmp_path / "tensorboard" / "sweep-0" / "plain")
    assert [event.step for event in events if event.HasField("summary")] == [1, 2, 3, 4]


def test_tensorboard_that_is_not_installed_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with (
        pytest.raises(UserError, match=r"not installed.*pip install tensorboardX"),
        open_streams(tmp_path / "metrics.jsonl", print, tensorboard=True),
    ):
        pass


def test_tensorboard_needs_a_folder_that_stays():
    inputs, labels = np.zeros((4, 2), np.float32), np.zeros(4, int)
    with pytest.raises(UserError, match="tensorboard=True needs `out`"):
        jdrop.compare(MLP((4,), 3), inputs, labels, inputs, labels, tensorboard=True)
