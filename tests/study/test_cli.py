"""The command `jdrop`, as a user types it."""

import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from jdrop import study
from jdrop.study import command, report
from jdrop.study.cli import compare_command, run_command
from jdrop.study.results import Comparison
from jdrop.study.settings import Settings

ROOT = Path(__file__).parents[2]
TINY = ["--replicates", "2", "--ensemble-size", "2", "--budget", "2", "--num-samples", "2"]
TINY += ["--epochs", "2", "--hidden", "8", "--train-size", "120", "--batch-size", "20"]
TINY += ["--no-theory", "--no-controls"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What the command printed to a terminal without Unicode, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [sys.executable, str(ROOT / "scripts" / "compare_ensembles.py"), *TINY]
    result = subprocess.run(
        [*arguments, "--out", "out"],
        capture_output=True,
        text=True,
        encoding="ascii",
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, folder / "out"


@pytest.fixture
def given_options(monkeypatch):
    """The options that reach the comparison, which is left out."""
    given = {}
    monkeypatch.setattr(command, "run", lambda options, command_line: given.update(options))
    return given


def test_the_command_is_installed_as_jdrop():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["jdrop"].split(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_setting_is_an_option_with_its_default_and_description():
    options = {option.name: option for option in compare_command.params}
    for field in dataclasses.fields(Settings):
        assert options[field.name].default == field.default
        assert options[field.name].help == field.metadata["description"]


def test_the_command_begins_with_what_it_will_do(finished):
    first, second, *_ = finished[0].splitlines()
    assert first.startswith("digits: 120 training examples, 1,677 test examples; model: MLP (8,)")
    assert second == "2 replicates of 2 plain and 2 dropout networks, 2 epochs; folder: out"


def test_the_command_ends_with_the_path_of_the_report(finished):
    printed, folder = finished
    assert printed.splitlines()[-1] == str(Path("out", "report.html"))
    assert (folder / "report.html").exists()


def test_a_terminal_without_unicode_loses_no_results(finished):
    printed, folder = finished
    assert "worth" in printed
    assert {"report.html", "report.md", "results.json"} <= {path.name for path in folder.iterdir()}
    command_line = json.loads((folder / "results.json").read_text())["command"]
    assert command_line.startswith("jdrop --replicates 2")


@pytest.mark.slow
def test_report_writes_the_files_of_a_folder_again(finished, capsys):
    folder = finished[1]
    before = Comparison.from_json((folder / "results.json").read_text())
    (folder / "results.json").unlink()
    assert run_command(["report", str(folder)]) == 0
    after = Comparison.from_json((folder / "results.json").read_text())
    assert [method.name for method in after.methods] == [method.name for method in before.methods]
    nll = before.method("dropout").point(1).scores["nll"].mean
    assert after.method("dropout").point(1).scores["nll"].mean == pytest.approx(nll)
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "report.html")


@pytest.mark.slow
def test_the_same_command_again_trains_nothing(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished[1].parent)
    written = []
    monkeypatch.setattr(report, "write", lambda _, folder: written.append(folder) or [])
    assert run_command([*TINY, "--out", "out"]) == 0
    assert not re.search(r"training \S+ networks", capsys.readouterr().out)
    assert written == [Path("out")]


def test_another_run_in_the_same_folder_is_refused(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished[1].parent)
    before = (finished[1] / "run.json").read_text()
    assert run_command([*TINY, "--out", "out", "--seed", "1"]) == 1
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert (finished[1] / "run.json").read_text() == before


@pytest.mark.slow
def test_results_that_cannot_be_written_leave_the_table(finished, monkeypatch, capsys):
    """As on a full disk: the numbers are on the terminal, and the error says what is missing."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jdrop.study.report.write", full)
    assert run_command(["report", str(finished[1])]) == 1
    output = capsys.readouterr()
    assert "worth" in output.out
    assert "No space left on device" in output.err


def test_an_out_that_cannot_be_written_is_told_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert run_command([*TINY, "--out", "file/below"]) in (1, 2)
    output = capsys.readouterr()
    assert "file" in output.err
    assert not output.out


def test_values_of_a_sweep_that_are_given_apart_are_swept_together(given_options):
    sweeps = ["--sweep", "rate=0.1", "--sweep", "rate=0.5", "--sweep", "train-size=20"]
    assert run_command(sweeps) == 0
    assert given_options["sweep"] == {"rate": [0.1, 0.5], "train_size": [20]}


def test_a_bug_shows_its_traceback(monkeypatch):
    def fail(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(command, "run", fail)
    with pytest.raises(ValueError, match="a bug"):
        run_command([])


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert run_command([]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_an_interrupt_while_modules_are_imported_is_one_line(monkeypatch, capsys):
    class Interrupting:
        @staticmethod
        def find_spec(name, *_):
            if name == "jdrop.study.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "jdrop.study.cli")
    monkeypatch.delattr("jdrop.study.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting, *sys.meta_path])
    assert study.main() == 130
    assert capsys.readouterr().err == "stopped before the work began.\n"


def test_the_command_line_is_kept_as_unicode(monkeypatch):
    lines = []
    monkeypatch.setattr(command, "run", lambda options, line: lines.append(line))
    assert run_command(["--dataset", os.fsdecode(b"caf\xe9.csv")]) == 0
    assert lines == ["jdrop --dataset 'caf?.csv'"]


def one_error_line(arguments, capsys):
    """What the command says of a mistake, with nothing else printed."""
    assert run_command(arguments) in (1, 2)
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert not output.out
    return output.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "1.5"], "'--rate': 1.5 is not in the range 0<x<1"),
        (["--rate", "nan"], "'--rate': nan is not a number"),
        (["--input-rate", "-0.1"], "'--input-rate': -0.1 is not in the range 0<=x<1"),
        (["--label-noise", "much"], "'--label-noise': 'much' is not a valid float range"),
        (["--dataset", "nowhere.csv", "--target", "y"], "nowhere.csv"),
        (["--dataset", "nowhere.npz"], "nowhere.npz"),
        (["--target", "y"], "--target is for tables, not for digits"),
        (["--groups", "nowhere.txt"], "groups (--groups) must be a text file"),
        (["--hidden", "256,x"], "'--hidden': must be positive integers such as 256,256"),
        (["--replicates", "1"], "'--replicates'"),
        (["--epochs", "0"], "'--epochs'"),
        (["--learning-rate", "0"], "'--learning-rate'"),
        (["--learning-rate", "nan"], "'--learning-rate': nan is not a number"),
        (["--train-size", "5000"], "5000"),
        (["--train-size", "1796"], "at least 2 test examples"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
        (["--data-dir", "nowhere"], "--data-dir has no effect on digits"),
        (["--ood", "cifar"], "ood must be one of"),
        (["--sweep", "rate"], "must be NAME=NUMBER"),
        (["--sweep", "depth=2"], "must name rate or train_size"),
        (["--sweep", "rate=0.1", "--sweep", "rate=0.1"], "must be different numbers"),
        (["--sweep", "train-size=20.7"], "must be a list of integers, got [20.7]"),
        (["--sweep", "label-noise=0.5", "--label-noise", "0.1"], "label_noise cannot be swept"),
        (["--hidden", "3000000,3000000"], "networks of 9,000,228,000,010 parameters take"),
        (["--sweep", "width-factor=1e9"], "more than the"),
        (["--margin", "nll=1,2"], "must be NAME=NUMBER"),
        (["--margin", "nll=-1"], "must be a number above 0"),
        (["--margin", "crps=1"], "must be of nll, calibrated_nll, brier, error"),
        (["--margin", "nll=1", "--margin", "nll=2"], "got nll twice"),
        (["--model", "nowhere"], "--model nowhere: must be MODULE:OBJECT"),
        (["--model", ":model"], "--model :model: must be MODULE:OBJECT"),
        (["--model", "nowhere:model"], "nowhere cannot be imported"),
        (["--model", ".nowhere:model"], ".nowhere cannot be imported"),
        (["--model", "math:nothing"], "math has no nothing"),
        (["--model", "math:pi"], "the model must be a linen module"),
        (["--model", "math:pi", "--hidden", "16"], "--hidden is for the MLP"),
        (["--predictions", "nowhere.npz"], "nowhere.npz"),
        (["--out", ""], "--out must name a folder"),
        (["report", "nowhere"], "nowhere"),
        (["--epochs", "3", "report", "."], "--epochs is no option of `jdrop report`"),
        (["--colour", "blue"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_value_gets_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in one_error_line(options, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--epochs=3", "--sweep=rate=0.1", "--model=x:y", "--no-theory"])
def test_options_without_effect_on_predictions_are_refused(tmp_path, capsys, option):
    path = tmp_path / "predictions.npz"
    np.savez(path, labels=np.zeros(2, int))
    message = one_error_line(["--predictions", str(path), option], capsys)
    assert "has no effect beside --predictions" in message


def test_groups_are_a_column_of_a_table_or_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [f"{i},{i % 3},{i % 2}" for i in range(20)]
    Path("table.csv").write_text("\n".join(["x,person,label", *rows]))
    Path("groups.txt").write_text("\n".join(str(i % 4) for i in range(20)))
    loaded = []
    monkeypatch.setattr(
        command, "run", lambda options, _: loaded.append(command.load_data(options))
    )
    options = ["--dataset", "table.csv", "--target", "label", "--groups"]
    assert run_command([*options, "person"]) == 0
    assert run_command([*options, "groups.txt"]) == 0
    assert [data.group_name for data in loaded] == ["person", "group"]
    assert [data.train_inputs.shape[1] for data in loaded] == [1, 2]
    assert [len(set(data.train_groups.tolist())) for data in loaded] == [3, 4]
    assert "must name a column of table.csv" in one_error_line([*options, "persons"], capsys)


def test_predictions_take_a_file_of_groups(tmp_path, monkeypatch):
    path, groups = tmp_path / "predictions.npz", tmp_path / "groups.txt"
    coin = np.full((4, 6, 2), np.log(0.5))
    np.savez(path, labels=np.arange(6) % 2, plain=coin, dropout=coin)
    groups.write_text("a\nb\nc\n" * 2)
    given = []

    def of_predictions(predictions, *_):
        given.append(predictions.groups.tolist())
        raise KeyboardInterrupt

    monkeypatch.setattr("jdrop.study.evaluation.of_predictions", of_predictions)
    run_command(["--predictions", str(path), "--groups", str(groups), "--out", str(tmp_path / "o")])
    assert given == [[0, 1, 2] * 2]


def test_label_noise_cannot_be_swept_in_regression(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).normal(size=(40, 2))
    np.savetxt("table.csv", values, delimiter=",", header="x,y", comments="")
    options = ["--dataset", "table.csv", "--target", "y", "--sweep", "label-noise=0.5"]
    assert "label_noise can be swept in classification only" in one_error_line(options, capsys)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("raise ValueError('broken')", "ValueError: broken"),
        ("import math; math.nothing", "AttributeError: module 'math' has no attribute"),
        ("def model(:", "SyntaxError"),
        ("import sys; sys.exit('gone')", "SystemExit: gone"),
    ],
)
def test_a_module_that_fails_is_named_with_the_cause(
    tmp_path, monkeypatch, capsys, request, source, message
):
    name = f"model_{request.node.callspec.indices['source']}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    line = one_error_line(["--model", f"{name}:model"], capsys)
    assert line.startswith(f"error: --model {name}:model: {name} cannot be imported: ")
    assert message in line


FAILING_MODELS = """
import flax.linen as nn


class Raises(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        raise RuntimeError("broken")


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(10)(x), x


def raises():
    raise ZeroDivisionError("broken")


def exits():
    raise SystemExit("broken")
"""


@pytest.mark.parametrize("model", ["Raises", "Pair", "raises", "exits"])
def test_a_model_that_fails_is_named_before_anything_is_written(
    tmp_path, monkeypatch, capsys, model
):
    (tmp_path / "failing_models.py").write_text(FAILING_MODELS)
    monkeypatch.chdir(tmp_path)
    line = one_error_line(["--model", f"failing_models:{model}"], capsys)
    assert line.startswith(f"error: --model failing_models:{model}: ")
    assert not (tmp_path / "comparison").exists()


DATA_OBJECTS = """
import flax.linen as nn
import jdrop.linen
import numpy as np


class Net(nn.Module):
    @nn.compact
    def __call__(self, ids, mask, train):
        x = nn.Embed(9, 4)(ids) * mask[..., None]
        return nn.Dense(3)(jdrop.linen.Dropout(0.5)(x, deterministic=not train))


ids = np.arange(240).reshape(60, 4) % 9
inputs = {"ids": ids, "mask": ids > 0}
labels = np.where(ids > 0, ids % 3, -1)
data = {
    "inputs": inputs, "labels": labels, "test_inputs": inputs, "test_labels": labels,
    "test_groups": np.arange(60) // 2,
}
pair = ids, labels
unknown = {**data, "weights": labels}


def four():
    return ids / 9, labels[:, 0] % 3, ids / 9, labels[:, 0] % 3


class Source:
    def __len__(self):
        return 60

    def __getitem__(self, index):
        return ids[index] / 9


def source():
    return Source(), labels[:, 0] % 3, Source(), labels[:, 0] % 3
"""


def test_a_dictionary_of_arrays_is_a_data_set(tmp_path, monkeypatch):
    (tmp_path / "data_objects.py").write_text(DATA_OBJECTS)
    monkeypatch.chdir(tmp_path)
    made = []

    def run(experiment, progress, *, tensorboard):
        made.append(experiment)
        raise KeyboardInterrupt

    monkeypatch.setattr("jdrop.study.comparison.Experiment.run", run)
    options = ["--model", "data_objects:Net", "--dataset", "data_objects:data"]
    run_command([*options, "--train-size", "20"])
    assert made[0].folder.name.startswith("data_objects.data-")
    load = functools.partial(command.load_data_object, seed=0)
    data = load("data_objects:data", train_size=20, label_noise=0.0)
    assert data.train_inputs["ids"].shape == (20, 4)
    assert data.num_classes == 3
    assert len(data.group_labels) == 30
    data = load("data_objects:four", train_size=None, label_noise=0.5)
    assert data.train_inputs.dtype == np.float32
    assert data.label_noise == 0.5
    streamed = load("data_objects:source", train_size=None, label_noise=0.5)
    np.testing.assert_array_equal(streamed.train_inputs, data.train_inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data_objects:pair"], "data_objects:pair .--dataset. must be a dictionary with inputs"),
        (["data_objects:unknown"], "and maybe ood_inputs, groups, test_groups"),
        (["data_objects:absent"], "data_objects has no absent"),
        (["data_objects:data", "--groups", "0"], "--groups is for files"),
        (["data_objects:data", "--label-noise", "0.1"], "labels are per token"),
    ],
)
def test_an_object_that_is_no_data_set_is_refused(tmp_path, monkeypatch, capsys, options, message):
    (tmp_path / "data_objects.py").write_text(DATA_OBJECTS)
    monkeypatch.chdir(tmp_path)
    assert re.search(message, one_error_line(["--dataset", *options], capsys))
