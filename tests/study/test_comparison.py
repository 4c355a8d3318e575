import dataclasses
import itertools
import json
import math
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from jdrop.study import report
from jdrop.study.comparison import Settings, _scores_by_size, compare
from jdrop.study.data import Dataset
from jdrop.study.results import SCORES, Comparison, format_score, write_text

SETTINGS = Settings(hidden=(16,), members=4, samples=3, epochs=3, batch_size=20, seed=1)


@pytest.fixture(scope="module")
def data():
    digits = load_digits()
    inputs, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    return Dataset("digits", inputs[:100], labels[:100], inputs[100:200], labels[100:200], 10, 0.0)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A comparison, the calls of its progress, and the files that it left in an empty folder."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("empty")
        patch.chdir(folder)
        comparison = compare(SETTINGS, data, lambda *call: calls.append(call))
        return comparison, calls, list(folder.iterdir())


@pytest.fixture(scope="module")
def comparison(run):
    return run[0]


def test_every_size_of_every_kind_has_a_row(comparison):
    kinds = [("plain", "weight scaling"), ("dropout", "weight scaling"), ("dropout", "Monte-Carlo")]
    expected = [(networks, reading, size) for networks, reading in kinds for size in range(1, 5)]
    rows = [(row.networks, row.reading, row.ensemble_size) for row in comparison.rows]
    assert rows == expected
    for row in comparison.rows:
        assert {*row.test} == {*SCORES}
        assert row.test["nll"].num_replicates == 4 // row.ensemble_size
        assert row.passes == row.ensemble_size * (3 if row.reading == "Monte-Carlo" else 1)
        assert row.parameters == row.ensemble_size * (64 * 16 + 16 + 16 * 10 + 10)


def test_scores_are_those_of_the_averages_of_groups():
    """Against averages of probabilities formed in float64, group by group."""
    random = np.random.default_rng(0)
    probs = random.dirichlet(np.ones(3), size=(5, 40))
    labels = random.integers(0, 3, 40).astype(np.int32)

    def nll(members):
        return -np.log(probs[list(members)].mean(0)[np.arange(40), labels]).mean()

    scores = _scores_by_size(jnp.log(probs), labels)
    assert sorted(scores) == [1, 2, 3, 4, 5]
    for size in scores:
        groups = [range(first, first + size) for first in range(0, 6 - size, size)]
        expected = [nll(group) for group in groups]
        np.testing.assert_allclose(scores[size]["nll"].replicates, expected, rtol=1e-5)
    everything = [nll(range(5)), nll(range(5))]
    np.testing.assert_allclose([scores[5]["nll"].mean, scores[5]["nll"].replicates[0]], everything)
    assert scores[1]["nll"].mean == pytest.approx(np.mean([nll([m]) for m in range(5)]), rel=1e-5)
    error = (probs.argmax(2) != labels).mean()
    assert scores[1]["error"].mean == pytest.approx(error, rel=1e-5)


def test_the_mean_over_groups_is_that_over_all_subsets():
    """Of three members every subset stands together on every circle, equally often."""
    random = np.random.default_rng(1)
    probs = random.dirichlet(np.ones(3), size=(3, 60))
    labels = random.integers(0, 3, 60).astype(np.int32)
    scores = _scores_by_size(jnp.log(probs), labels)
    for size in (1, 2, 3):
        values = [
            -np.log(probs[list(subset)].mean(0)[np.arange(60), labels]).mean()
            for subset in itertools.combinations(range(3), size)
        ]
        assert scores[size]["nll"].mean == pytest.approx(np.mean(values), rel=1e-5)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_that_compares_nothing_is_an_error(rate, data):
    with pytest.raises(ValueError, match="rate must lie in"):
        compare(dataclasses.replace(SETTINGS, rate=rate), data, lambda *_: None)


def test_the_same_seed_gives_the_same_numbers(comparison, data):
    again = compare(SETTINGS, data, lambda *_: None)
    assert [row.test for row in again.rows] == [row.test for row in comparison.rows]


def test_another_seed_gives_other_numbers(comparison, data):
    other = compare(dataclasses.replace(SETTINGS, seed=2), data, lambda *_: None)
    assert all(ours.test != row.test for ours, row in zip(other.rows, comparison.rows, strict=True))


def test_the_plain_networks_do_not_depend_on_the_dropout_networks(comparison, data):
    settings = dataclasses.replace(SETTINGS, rate=0.2, samples=1)
    other = compare(settings, data, lambda *_: None)
    for size in range(1, 5):
        assert other.row("plain", size).test == comparison.row("plain", size).test
        assert other.row("dropout", size).test != comparison.row("dropout", size).test


def test_progress_counts_up_to_its_total(run):
    _, calls, _ = run
    tasks = list(dict.fromkeys(what for what, _, _ in calls))
    assert tasks == ["training 4 plain networks", "training 4 dropout networks", "sampling masks"]
    for task in tasks:
        done = [done for what, done, _ in calls if what == task]
        assert all(after == before + 1 for before, after in pairwise(done))
        assert done[-1] == next(total for what, _, total in calls if what == task)


def test_computing_writes_no_file(run):
    _, _, files = run
    assert not files


def test_json_reads_back_as_the_same_comparison(comparison):
    text = comparison.to_json()
    assert Comparison.from_json(text) == comparison
    assert json.loads(text)["rows"][0]["test"]["nll"]["mean"] > 0


def test_the_gap_is_test_less_train(comparison):
    for row in comparison.rows:
        if row.train is not None:
            for score in SCORES:
                difference = row.test[score].mean - row.train[score].mean
                assert row.gap[score].mean == pytest.approx(difference, abs=1e-9)


def with_means(comparison, plain, dropout, half_width):
    """The comparison with these mean scores for plain ensembles and one dropout network."""
    rows = []
    for row in comparison.rows:
        mean = dropout if row.networks == "dropout" else plain[row.ensemble_size - 1]
        low, high = mean - half_width, mean + half_width
        interval = dataclasses.replace(row.test["nll"], mean=mean, low=low, high=high)
        rows.append(dataclasses.replace(row, test=dict.fromkeys(SCORES, interval)))
    return dataclasses.replace(comparison, rows=rows)


@pytest.mark.parametrize(
    ("dropout", "half_width", "worth"),
    [
        (0.35, 0.0, "2 [2, 2]"),
        (0.3, 0.0, "2 [2, 2]"),
        (0.29, 0.05, "3 [2, 3]"),
        (0.05, 0.1, ">4 [4, >4]"),
        (0.49, 0.15, "2 [≤1, 2]"),
    ],
)
def test_worth_is_the_smallest_plain_ensemble_at_least_as_good(
    comparison, dropout, half_width, worth
):
    made = with_means(comparison, [0.5, 0.3, 0.2, 0.15], dropout, half_width)
    assert made.worth("nll") == worth
    assert f"worth {worth} averaged plain networks in NLL" in made.sentence()


def test_scores_are_shown_with_half_their_interval(comparison):
    interval = dataclasses.replace(comparison.rows[0].test["nll"], mean=0.1, low=0.07, high=0.13)
    assert format_score("nll", interval) == "0.100 ± 0.030"
    assert format_score("error", interval) == "10.00 ± 3.00"
    one = dataclasses.replace(interval, low=None, high=None, num_replicates=1)
    assert format_score("nll", one) == "0.100"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "second, with a lone surrogate \ud800")
    assert path.read_text() == "first"


def test_the_report_stands_alone(comparison, tmp_path):
    written = report.write(comparison, tmp_path / "new" / "folder", "the command")
    names = ["results.json", "networks.png", "learning_curves.png", "report.html"]
    assert [path.name for path in written] == names
    html = written[-1].read_text()
    for outside in ("http://", "https://", "<script", "<link", "src="):
        # The names of XML namespaces look like addresses, but nothing is fetched from them.
        assert outside not in html.replace("http://www.w3.org/", "").replace(
            "http://purl.org/", ""
        ).replace("http://creativecommons.org/", "").replace("https://matplotlib.org/", "")
    assert comparison.sentence().split("[")[0] in html
    for cells in report.table_rows(comparison):
        assert all(cell in html for cell in cells)
    assert html.count("<svg") == 2
    assert html.count("aria-label=") == 2
    assert "the command" in html


def test_a_single_group_shows_no_interval(comparison):
    row = comparison.row("plain", 4)
    assert row.test["error"].low is None
    assert "±" not in report.table_rows(comparison)[1][1]
    assert not math.isnan(row.test["error"].mean)
