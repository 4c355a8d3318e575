"""The losses and the truths of the studies of `scripts/coverage.py`, and its table."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bounds import mean_bound
from sklearn.metrics import log_loss

SCRIPTS = Path(__file__).parents[1] / "scripts"

STUDIES = runpy.run_path(str(SCRIPTS / "coverage_studies.py"))


def test_losses_by_size_are_means_over_averages_of_neighbouring_networks():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), size=(2, 4, 5)).transpose(3, 0, 1, 2)
    losses = STUDIES["losses_by_size"](probs)
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


def test_a_method_is_an_average_of_the_first_networks_or_a_mixture_of_two():
    probs = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, 15, 5)).transpose(3, 0, 1, 2)
    methods = STUDIES["method_losses"](probs)
    nll = {size: -np.log(probs[0, :, :size].mean(1)) for size in (1, 2, 9, 10, 15)}
    assert STUDIES["TRUTHS"] == (1, 1.5, 2, 5, 9.5, 10, 15)
    expected = {0: nll[1], 1: (nll[1] + nll[2]) / 2, 4: (nll[9] + nll[10]) / 2, 6: nll[15]}
    for position, losses in expected.items():
        np.testing.assert_allclose(methods[0][:, position], losses, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(STUDIES["SIMULATORS"]))
def test_at_its_truth_a_method_has_the_loss_of_the_ensemble(name):
    """The mean over 40 studies, whose differences are independent."""
    rng, truths = np.random.default_rng(0), STUDIES["TRUTHS"]
    differences = []
    for _ in range(40):
        study = STUDIES["simulate"](name, rng, 2)
        # The mean over replicates and examples: `[score, size]` and `[score, truth]`.
        curve, methods = study.plain.mean((1, 3)), study.methods.mean((1, 3))
        differences.append(
            [
                methods[:, position] - np.array([np.interp(truth, range(1, 11), c) for c in curve])
                for position, truth in enumerate(truths[:-1])
            ]
        )
    mean, variance = np.mean(differences, 0), np.var(differences, 0, ddof=1)
    assert (np.abs(mean) < mean_bound(1, 40) * np.sqrt(variance)).all()


def test_networks_differ_on_rare_examples_only():
    probs, groups = STUDIES["draw_networks"]("rare", np.random.default_rng(0), 2, 3)
    assert groups is None
    differ = np.ptp(probs, axis=(1, 2)).max(0) > 1e-6
    assert 5 < differ.sum() < 60


def test_examples_of_a_group_are_correlated():
    rng = np.random.default_rng(0)
    groups = STUDIES["draw_groups"](rng)
    sizes = np.bincount(groups)
    assert groups.shape == (500,)
    assert sizes[:-1].min() >= 4
    assert sizes.max() <= 16
    values = STUDIES["normal_by_group"](rng, (4000,), np.repeat(np.arange(250), 2))
    first, second = values[:, ::2].ravel(), values[:, 1::2].ravel()
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.8, abs=0.01)
    assert values.std() == pytest.approx(1, abs=0.01)


def test_the_table_is_printed_and_written(tmp_path):
    out = tmp_path / "coverage.md"
    command = [sys.executable, SCRIPTS / "coverage.py", "--studies", "1", "--out", out]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    page = out.read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    header, _, *cells = rows
    assert header[3:10] == ["1", "1.5", "2", "5", "9.5", "10", ">10"]
    assert len(cells) == 5 * 3 * 4
    for name in ("gauss", "heavy", "rare", "sharp", "groups"):
        assert name in result.stdout
    # Two replicates are refused, and a study of one has a coverage of 0 or 100.
    assert {row[-1] for row in cells if row[2] == "2"} == {"100.0 |"}
    assert {entry for row in cells for entry in row[3:10]} <= {"0.0", "100.0"}
    assert "python scripts/coverage.py --studies 1 --seed 0" in page
