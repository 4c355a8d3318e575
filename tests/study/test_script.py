"""The script as its user runs it."""

import dataclasses
import errno
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jdrop.study.comparison import compare

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_ensembles.py"
TINY = ["--members", "2", "--epochs", "2", "--samples", "2", "--hidden", "8", "--train-size", "60"]


@pytest.fixture(scope="module")
def run_command():
    spec = importlib.util.spec_from_file_location("compare_ensembles", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.run_command


def test_a_tiny_run_leaves_its_results(tmp_path):
    options = [*TINY, "--label-noise", "0.2", "--input-rate", "0.1"]
    command = [sys.executable, str(SCRIPT), *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert "0 s left" in result.stdout
    assert "average of 2" in result.stdout
    assert "one dropout network (weight scaling) is worth" in " ".join(result.stdout.split())
    out = tmp_path / "comparison"
    files = {path.name for path in out.iterdir()}
    assert files == {"results.json", "report.html", "networks.png", "learning_curves.png"}
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["hidden"] == [8]
    assert results["data"]["label_noise"] == 0.2
    assert len(results["rows"]) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "1.5"], "'--rate': must lie in (0, 1), got 1.5"),
        (["--rate", "nan"], "'--rate': must lie in (0, 1), got nan"),
        (["--rate", "0"], "'--rate': must lie in (0, 1), got 0"),
        (["--input-rate", "-0.1"], "'--input-rate': must lie in [0, 1), got -0.1"),
        (["--label-noise", "much"], "'--label-noise': must lie in [0, 1), got much"),
        (["--dataset", "cifar"], "'--dataset': 'cifar' is not one of"),
        (["--hidden", "256,x"], "'--hidden': must be positive numbers such as 256,256"),
        (["--members", "1"], "'--members'"),
        (["--epochs", "0"], "'--epochs'"),
        (["--learning-rate", "0"], "'--learning-rate'"),
        (["--learning-rate", "nan"], "--learning-rate must be finite, got nan"),
        (["--data-dir", "nowhere"], "--data-dir is for mnist and fashion-mnist"),
        (["--batch-size", "501"], "--batch-size must not exceed the 500 training examples"),
        (["--train-size", "5000"], "5000"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
        (["--colour", "blue"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_value_gets_one_line_and_exit_code_2(
    run_command, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    assert run_command(options) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert not output.out
    assert not list(tmp_path.iterdir())


def test_an_out_that_cannot_be_written_is_told_before_training(
    run_command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert run_command([*TINY, "--out", "file/below"]) == 2
    output = capsys.readouterr()
    assert "file/below" in output.err
    assert not output.out


def test_training_that_diverges_is_told_and_gives_no_verdict(
    run_command, tmp_path, monkeypatch, capsys
):
    def diverged(settings, data, progress):
        return compare(dataclasses.replace(settings, learning_rate=math.inf), data, progress)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(run_command.__globals__, "compare", diverged)
    assert run_command(TINY) == 1
    output = capsys.readouterr()
    assert "training diverged: 2 of 2 networks" in output.err
    assert "worth" not in output.out


def test_results_that_cannot_be_written_leave_the_table(run_command, tmp_path, monkeypatch, capsys):
    """As on a full disk: the numbers are on the terminal, and the error says what is missing."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jdrop.study.report.write_text", full)
    assert run_command(TINY) == 1
    output = capsys.readouterr()
    assert "test NLL" in output.out
    assert "No space left on device" in output.err
