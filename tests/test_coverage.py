"""The losses and the true equivalents of `scripts/coverage.py`, and its table."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import log_loss

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "coverage.py"))


def test_losses_by_size_are_means_over_averages_of_neighbouring_networks():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), size=(2, 4, 5)).transpose(3, 0, 1, 2)
    losses = SCRIPT["losses_by_size"](probs)
    assert losses.shape == (3, 2, 4, 5)
    labels = np.zeros(5, int)
    for replicate in range(2):
        for size in range(1, 5):
            nll, brier, error = [], [], []
            for start in range(4):
                members = [(start + i) % 4 for i in range(size)]
                pool = probs[:, replicate, members].mean(1).T
                nll.append(log_loss(labels, pool, labels=[0, 1, 2]))
                brier.append(np.square(pool - np.eye(3)[labels]).sum(1).mean())
                error.append((pool.argmax(1) != 0).mean())
            means = losses[:, replicate, size - 1].mean(-1)
            assert means == pytest.approx([np.mean(nll), np.mean(brier), np.mean(error)], rel=1e-5)


def test_the_true_equivalent_is_where_the_mean_difference_is_zero():
    differences = np.array([[3.0, 1.0, -1.0], [1.0, 1.0, -1.0]])
    assert SCRIPT["crossing"](differences)[0] == pytest.approx(2.5)
    assert SCRIPT["crossing"](differences - 1.5)[0] == pytest.approx(1 + 0.5 / 1)
    assert SCRIPT["crossing"](differences - 3)[0] == 1
    assert SCRIPT["crossing"](differences + 3)[0] == math.inf
    # The first batch crosses at 2 and the second at 3, with the slope 2.
    uneven = np.array([[2.0, 0.0, -2.0], [4.0, 2.0, 0.0]])
    assert SCRIPT["crossing"](uneven) == pytest.approx((2.5, 0.5))


def test_the_table_is_printed():
    result = CliRunner().invoke(SCRIPT["main"], ["--studies", "2", "--batches", "2"])
    assert result.exit_code == 0, result.output
    for text in ("NLL", "Brier", "error", "2 studies of 500 examples"):
        assert text in result.output
