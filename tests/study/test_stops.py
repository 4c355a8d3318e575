"""Runs that are stopped or killed, and two runs in one folder."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from jdrop.study import command
from jdrop.study.cli import _Terminated, run_command
from jdrop.study.parts import TuningPart
from jdrop.study.run_folder import RunError, RunFolder

COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # Shells ignore it in the background.
from jdrop.study import main
sys.exit(main())
"""
TINY = ["--replicates", "2", "--ensemble-size", "2", "--budget", "2", "--num-samples", "2"]
TINY += ["--hidden", "4", "--train-size", "40", "--batch-size", "20"]
TINY += ["--no-tune", "--no-theory", "--no-controls"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_training_which_goes_on_from_there(tmp_path, number):
    """It comes after a quarter of the first training."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *TINY, "--epochs", "4000", "--out", "out"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("training plain networks: 1000/4000"):
                break
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, errors
    lines = [line for line in errors.splitlines() if line]
    assert len(lines) == 1, errors
    assert re.fullmatch(
        r"stopped; out keeps what is done \(complete: data, baselines.*; "
        r"(plain|dropout) after \d+ epochs\); the same command goes on from there\.",
        lines[0],
    )


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    folder = RunFolder(tmp_path, {})
    code = "import os, pathlib; from jdrop.study.run_folder import RunFolder\n"
    code += f"with RunFolder(pathlib.Path({str(tmp_path)!r}), {{}}).locked():\n"
    code += "    print('locked', flush=True); os.kill(os.getpid(), 9)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.stdout == "locked\n"
    assert process.returncode == -signal.SIGKILL
    with folder.locked():
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
        with pytest.raises(RunError, match=rf"another run is at work .*process {os.getpid()} on"):
            RunFolder(tmp_path, {}).locked().__enter__()
    with folder.locked():
        pass


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt, 130), (_Terminated, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_stopped_command_says_what_is_kept_and_how_to_go_on(monkeypatch, capsys, stop, code):
    def run(*_):
        raise stop("stopped; out keeps what is done (complete: data)")

    monkeypatch.setattr(command, "run", run)
    assert run_command([]) == code
    assert capsys.readouterr().err.strip() == (
        "stopped; out keeps what is done (complete: data); the same command goes on from there."
    )


def test_a_stopped_run_lists_its_parts_and_its_trainings(tmp_path):
    folder = RunFolder(tmp_path, {})
    assert folder.describe_progress() == "nothing yet"
    folder.store("tuning-plain", TuningPart([1], {}, 1.0))
    folder.checkpoints("sweep-0/plain", 2).save(12, {"w": np.zeros((2, 2))}, {})
    assert folder.describe_progress() == "complete: tuning-plain; sweep-0/plain after 12 epochs"
