"""Cross-validation: which examples it reads, what it scores, and what it chooses."""

import dataclasses

import numpy as np
import pytest

from jdrop.study import runner, tuning
from jdrop.study.data import Dataset
from jdrop.study.evaluation import evaluate
from jdrop.study.methods import METHODS
from jdrop.study.models import MLP, Model
from jdrop.study.parts import NetworksPart, TuningPart
from jdrop.study.results import Comparison
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings
from jdrop.study.tuning import Choice, average_losses

MODEL = Model(lambda: MLP((6,), 3))
SETTINGS = Settings(
    replicates=3, ensemble_size=2, budget=2, num_samples=2, epochs=4, batch_size=10, theory=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(90, 5)).astype(np.float32)
    labels = np.argmax(inputs[:, :3] + rng.normal(size=(90, 3)), 1).astype(np.int32)
    return Dataset("noise", inputs[:50], labels[:50], inputs[50:], labels[50:], 3)


def run(folder, data, settings=SETTINGS):
    run_folder = RunFolder(folder, dataclasses.asdict(settings))
    runner.run_parts(
        run_folder, settings, MODEL, data, sweep={}, command="test", progress=lambda *call: None
    )
    return run_folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), data)


def test_losses_are_those_of_every_average_of_neighbours():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), size=(2, 3, 7))
    labels = rng.integers(0, 4, 7)
    left_out = [np.array([0, 2, 3]), np.array([1, 6])]
    found = average_losses(np.log(probs).astype(np.float32), labels, left_out)
    for size in (1, 2, 3):
        losses = []
        for replicate, rows in enumerate(left_out):
            of_groups = []
            for start in range(3):
                group = [(start + step) % 3 for step in range(size)]
                average = probs[replicate, group].mean(0)
                of_groups += [-np.log(average[row, labels[row]]) for row in rows]
            losses.append(np.mean(of_groups))
        assert found[size - 1] == pytest.approx(np.mean(losses), rel=1e-5)


def test_losses_of_regression_are_squared_errors_of_averages():
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(size=(1, 2, 5)), rng.normal(size=5)
    rows = np.array([0, 4])
    found = average_losses(outputs, targets, [rows])
    singles = ((outputs[0] - targets) ** 2)[:, rows].mean()
    average = ((outputs[0].mean(0) - targets) ** 2)[rows].mean()
    assert found == pytest.approx([singles, average])


def test_an_impossible_label_has_a_large_finite_loss():
    log_probs = np.full((1, 1, 1, 2), -np.inf)
    assert 80 < average_losses(log_probs, np.array([0]), [np.array([0])])[0] < 100


PART = TuningPart(
    epochs=[1, 2, 4],
    losses={
        "plain": [[[0.5, 0.4], [0.3, 0.35], [0.4, 0.3]]],
        "monte-carlo": [[[0.5], [0.4], [0.45]]],
        "weight-decay": [
            [[0.5], [0.4], [0.6]],
            [[0.5], [0.5], [0.5]],
            [[0.9], [0.6], [0.35]],
            [[0.9], [0.9], [0.9]],
        ],
        "early-stopping": [[[0.5], [0.4], [0.6]]],
    },
    epoch_flops=10.0,
)


def test_each_size_has_the_epochs_with_its_smallest_loss():
    choices = tuning.own_choices(METHODS["plain"], (1, 2), SETTINGS, PART)
    assert choices == {1: Choice(2), 2: Choice(4)}


def test_masks_and_weight_scaling_of_the_same_networks_have_the_same_epochs():
    for name in ("monte-carlo", "weight-scaling"):
        choices = tuning.own_choices(METHODS[name], (1, 2), SETTINGS, PART)
        assert choices == {1: Choice(2), 2: Choice(2)}


def test_the_weight_decay_and_the_epochs_are_chosen_together():
    method = METHODS["weight-decay"]
    assert tuning.own_choices(method, (1,), SETTINGS, PART) == {1: Choice(4, 1.0)}
    two_epochs = dataclasses.replace(SETTINGS, epochs=2)
    assert tuning.same_epochs_choice(method, two_epochs, PART) == Choice(2, 0.0)


def test_the_search_trains_a_network_with_each_weight_decay():
    def flops(name):
        return tuning.search_flops(METHODS[name], 1, SETTINGS, PART)

    assert flops("plain") == 40.0
    assert flops("weight-decay") == 160.0
    assert flops("early-stopping") == 40.0


def test_the_search_of_a_size_ends_when_that_size_is_past_its_best():
    losses = [[[0.3, 0.5], [0.4, 0.4], [0.5, 0.3], [0.6, 0.2]]]
    part = TuningPart([1, 2, 4, 8], {"plain": losses}, 10.0)
    settings = dataclasses.replace(SETTINGS, epochs=2)
    assert tuning.searches(METHODS["plain"], (1, 2), settings, part) == {1: 20.0, 2: 80.0}


def test_early_stopping_has_its_own_epochs_among_methods_of_the_same_epochs():
    method = METHODS["early-stopping"]
    assert tuning.same_epochs_choice(method, SETTINGS, PART) == Choice(2, 0.0)
    shorter = dataclasses.replace(SETTINGS, epochs=1)
    assert tuning.same_epochs_choice(method, shorter, PART) == Choice(1, 0.0)
    assert tuning.same_epochs_choice(METHODS["plain"], SETTINGS, PART) == Choice(4)
    assert tuning.same_epochs_choice(METHODS["long"], SETTINGS, None) == Choice(8)


def test_all_choices_hold_the_two_views_and_nothing_else():
    plain = tuning.all_choices(METHODS["plain"], SETTINGS, PART)
    assert [(choice.epochs, choice.weight_decay) for choice in plain] == [(2, None), (4, None)]
    untuned = dataclasses.replace(SETTINGS, tune=False)
    assert tuning.all_choices(METHODS["plain"], untuned, None) == [Choice(4)]
    stopped = tuning.all_choices(METHODS["early-stopping"], SETTINGS, PART)
    assert stopped == [Choice(2, 0.0)]


@pytest.mark.parametrize(
    ("epochs", "tune", "expected"),
    [
        (50, True, (5, 10, 20, 30, 40, 50, 75, 100)),
        (50, False, (5, 10, 20, 30, 40, 50)),
        (1, True, (1, 2)),
    ],
)
def test_candidates_lie_around_the_epochs_of_the_settings(epochs, tune, expected):
    assert tuning.candidates(Settings(epochs=epochs, tune=tune)) == expected


@pytest.mark.parametrize("last_is_best", [True, False])
def test_the_search_goes_on_only_while_the_last_candidate_is_best(last_is_best):
    losses = [0.7, 0.5, 0.4, 0.3, 0.35, 0.2 if last_is_best else 0.36]
    assert tuning._is_enough([{"plain": [[loss]]} for loss in losses]) is not last_is_best


@pytest.mark.slow
def test_the_test_examples_change_no_choice(data, finished, tmp_path):
    rng = np.random.default_rng(1)
    other = dataclasses.replace(data, test_labels=rng.permutation(data.test_labels))
    again = run(tmp_path, other)
    for name in ("tuning-plain", "tuning-dropout", "tuning-regularised"):
        part = finished.require(name, TuningPart)
        assert again.require(name, TuningPart) == part


@pytest.mark.slow
def test_each_network_leaves_out_the_fold_that_it_is_scored_on(data, tmp_path, monkeypatch):
    """Labels of a replicate's left-out examples change its losses, but not its networks."""
    outputs = {}
    original = tuning.average_losses

    def record(values, labels, left_out):
        outputs.setdefault("values", []).append(values)
        outputs["left_out"] = left_out
        return original(values, labels, left_out)

    monkeypatch.setattr(tuning, "average_losses", record)
    settings = dataclasses.replace(SETTINGS, controls=False)
    run(tmp_path / "first", data, settings)
    first, left_out = outputs.pop("values"), outputs["left_out"]
    assert len(left_out) == 3
    assert not set(left_out[0]) & set(left_out[1])
    inputs = data.train_inputs.copy()
    inputs[left_out[0]] += 1000.0
    run(tmp_path / "second", dataclasses.replace(data, train_inputs=inputs), settings)
    kept = np.setdiff1d(np.arange(50), left_out[0])
    for before, after in zip(first, outputs["values"], strict=True):
        np.testing.assert_array_equal(before[0][:, kept], after[0][:, kept])
        assert not np.array_equal(before[1][:, kept], after[1][:, kept])


@pytest.mark.slow
def test_the_networks_that_are_compared_train_on_all_examples(finished, data):
    part = finished.require("regularised", NetworksPart)
    tuned = finished.require("tuning-regularised", TuningPart)
    own = tuning.own_choice(METHODS["weight-decay"], 1, tuned)
    stored = {(each.epochs, each.weight_decay) for each in part.methods["weight-decay"]}
    assert (own.epochs, own.weight_decay) in stored
    # As many steps as networks without cross-validation: 50 examples in batches of 10.
    plain = finished.require("plain", NetworksPart)
    assert part.epoch_flops == pytest.approx(plain.epoch_flops, rel=0.05)


@pytest.mark.slow
def test_both_views_are_evaluated(finished):
    comparison = evaluate(finished)
    for method in comparison.same_epochs:
        if method.name != "early-stopping" and not method.is_baseline:
            assert {point.epochs for point in method.points} == {4}
    for curve in comparison.tuning:
        if curve.chosen is not None:
            best = curve.epochs[int(np.argmin(curve.losses))]
            assert curve.chosen == best
            size = curve.size if METHODS[curve.method].unit == "networks" else 2
            point = comparison.method(curve.method).point(size)
            assert (point.epochs, point.weight_decay) == (best, curve.weight_decay)
    masks = comparison.method("monte-carlo").points[-1]
    assert comparison.method("weight-scaling").points[0].epochs == masks.epochs
    expected = (
        masks.scores["nll"].mean - comparison.method("weight-scaling").points[0].scores["nll"].mean
    )
    assert comparison.mask_curve.minus_weight_scaling["nll"].mean == pytest.approx(expected)


@pytest.mark.slow
def test_resamples_choose_among_all_candidates(finished):
    comparison = evaluate(finished)
    shares = {}
    for curve in comparison.tuning:
        assert len(curve.choice_shares) == len(curve.epochs)
        assert min(curve.choice_shares) >= 0
        key = curve.method, curve.size
        shares[key] = shares.get(key, 0) + sum(curve.choice_shares)
    assert {("plain", 1), ("plain", 2), ("dropout", 1), ("weight-decay", 1)} < {*shares}
    assert [*shares.values()] == pytest.approx([1.0] * len(shares))
    # The losses of the examples are needed no more.
    assert not [*finished.folder.rglob("slices/**/losses-after-*")]
    assert Comparison.from_json(comparison.to_json()).tuning == comparison.tuning


@pytest.mark.slow
def test_without_tuning_only_controls_search(data, tmp_path):
    settings = dataclasses.replace(SETTINGS, tune=False)
    run_folder = run(tmp_path, data, settings)
    assert [path.stem for path in (tmp_path / "parts").glob("tuning-*.json")] == [
        "tuning-regularised"
    ]
    comparison = evaluate(run_folder)
    assert comparison.same_epochs is None
    assert all(curve.choice_shares is None for curve in comparison.tuning)
    assert comparison.method("plain").points[0].epochs == 4
    assert comparison.method("long").points[0].epochs == 8
    assert comparison.method("weight-decay").points[0].cost.search_flops > 0
    assert comparison.method("early-stopping").points[0].epochs <= 4
