"""Disturbed runs end with the numbers of an undisturbed one; `scripts/faults.py` tries more."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "faults.py"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kills", "stops", "last-cell", "two-runs", "clock"])
def test_a_disturbed_run_ends_with_the_same_numbers(tmp_path, fault):
    table = tmp_path / "faults.md"
    result = subprocess.run(
        [sys.executable, SCRIPT, fault, "--kills", "3", "--out", table],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert table.read_text().rstrip().endswith("the same numbers |")
