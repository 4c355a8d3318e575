"""What `scripts/coverage.py` takes for the truth, and that it runs."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import log_loss

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "coverage.py"))


def test_losses_are_those_of_averages_of_neighbours():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), size=(2, 4, 5)).transpose(3, 0, 1, 2)
    found = SCRIPT["losses_by_size"](probs)
    assert found.shape == (3, 2, 4, 5)
    right = np.zeros(5, int)
    for replicate in range(2):
        for size in range(1, 5):
            nll, brier, error = [], [], []
            for start in range(4):
                members = [(start + i) % 4 for i in range(size)]
                pool = probs[:, replicate, members].mean(1).T
                nll.append(log_loss(right, pool, labels=[0, 1, 2]))
                brier.append(np.square(pool - np.eye(3)[right]).sum(1).mean())
                error.append((pool.argmax(1) != 0).mean())
            means = found[:, replicate, size - 1].mean(-1)
            assert means == pytest.approx([np.mean(nll), np.mean(brier), np.mean(error)], rel=1e-5)


def test_the_truth_is_where_the_differences_cross():
    differences = np.array([[3.0, 1.0, -1.0], [1.0, 1.0, -1.0]])
    assert SCRIPT["crossing"](differences)[0] == pytest.approx(2.5)
    assert SCRIPT["crossing"](differences - 1.5)[0] == pytest.approx(1 + 0.5 / 1)
    assert SCRIPT["crossing"](differences - 3)[0] == 1
    assert SCRIPT["crossing"](differences + 3)[0] == math.inf
    # One batch says 2, the other 3, and the slope is 2.
    uneven = np.array([[2.0, 0.0, -2.0], [4.0, 2.0, 0.0]])
    assert SCRIPT["crossing"](uneven) == pytest.approx((2.5, 0.5))


def test_the_table_is_printed():
    found = CliRunner().invoke(SCRIPT["main"], ["--studies", "2", "--batches", "2"])
    assert found.exit_code == 0, found.output
    for text in ("NLL", "Brier", "error", "2 studies of 500 examples"):
        assert text in found.output
