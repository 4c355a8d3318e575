"""A whole comparison, as a user runs it: one tiny run, its results, and its identity."""

import functools
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pytest

import jdrop.linen
from jdrop.statistics import EnsembleCurve, crossed_interval, group_losses
from jdrop.study import evaluation, report
from jdrop.study.comparison import (
    Experiment,
    default_folder,
    hash_program,
    name_of,
    run_config,
)
from jdrop.study.data import from_arrays
from jdrop.study.diverged import DivergedError
from jdrop.study.errors import UserError
from jdrop.study.models import MLP, Model
from jdrop.study.parts import BaselinesPart, DataPart, NetworksPart
from jdrop.study.results import Comparison
from jdrop.study.run_folder import RunError, RunFolder
from jdrop.study.scores import COSTS, CURVE_SCORES
from jdrop.study.settings import Settings

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_ensembles.py"
TINY = ["--replicates", "2", "--ensemble-size", "3", "--budget", "2", "--num-samples", "4"]
TINY += ["--epochs", "2", "--hidden", "8", "--train-size", "120", "--batch-size", "20"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What the script printed, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, str(SCRIPT), *TINY, "--label-noise", "0.2", "--out", "out"]
    command += ["--sweep", "rate=0.2,0.6"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout, folder / "out"


@pytest.fixture(scope="module")
def comparison(finished):
    return Comparison.from_json((finished[1] / "results.json").read_text())


def test_the_terminal_tells_the_answer_and_the_time_left(finished):
    printed = " ".join(finished[0].split())
    assert "0 s left" in printed
    assert "one dropout network (weight scaling) differs from one plain network by" in printed
    assert "enough" in printed
    for line in finished[0].splitlines()[2:]:  # After the two lines that say what will be done.
        assert len(line) <= 80


def test_the_metrics_of_every_training_are_in_a_file(finished):
    lines = (finished[1] / "metrics.jsonl").read_text().splitlines()
    by_part = {}
    for line in map(json.loads, lines):
        by_part.setdefault(line["part"], []).append((line["epoch"], len(line["loss"])))
    # Cross-validation chooses the epochs of the one, but not of the other.
    assert by_part["plain"] == [(epoch, 6) for epoch in range(1, len(by_part["plain"]) + 1)]
    assert by_part["sweep-0/dropout"] == [(1, 2), (2, 2)]
    assert {"dropout", "tuning-plain", "exact", "sweep-0/plain", "sweep-1/dropout"} <= {*by_part}
    assert "loss" in finished[0]


def test_every_method_is_there_with_its_sizes(comparison):
    sizes = {method.name: [point.size for point in method.points] for method in comparison.methods}
    assert sizes == {
        "plain": [1, 2, 3],
        "dropout": [1, 2],
        "monte-carlo": [1, 2, 3, 4],
        "weight-scaling": [1],
        "dropout-thinned": [1],
        "small": [1, 2],
        "wide": [1],
        "weight-decay": [1],
        "fixed-masks": [1, 2],
        "masksembles": [1, 2],
        "logistic-regression": [1],
        "constant": [1],
    }
    same_epochs = {method.name for method in comparison.same_epochs}
    assert same_epochs == {*sizes, "early-stopping"}
    assert comparison.replicates == 2
    for method, point in itertools.chain.from_iterable(
        [(method, point) for point in method.points] for method in comparison.methods
    ):
        assert {*point.worth} == {*point.against_ensemble} == {*CURVE_SCORES["classification"]}
        if point.size in method.table:
            assert {*point.scores} > {"ece", "debiased_ece", "aurc"}
            # Baselines predict for the test inputs alone.
            assert ("auroc_entropy" in point.scores) != method.is_baseline
            assert ("mutual_information" in point.scores) == (point.size > 1)


def test_costs_are_those_of_the_networks(comparison):
    parameters = 64 * 8 + 8 + 8 * 10 + 10
    steps = 2 * 120 // 20
    same_epochs = {method.name: method for method in comparison.same_epochs}

    def cost(name, size=1):
        return same_epochs[name].point(size).cost

    one = cost("plain")
    assert one.parameters == parameters
    assert one.bytes == 4 * parameters
    # Two multiply-adds of every weight in a forward pass; about three times that in training.
    weights = 64 * 8 + 8 * 10
    assert 2 * weights < one.predict_flops < 3 * weights
    assert 4 * weights * 20 * steps < one.train_flops < 9 * weights * 20 * steps
    for name in COSTS:
        assert getattr(cost("plain", 3), name) == pytest.approx(3 * getattr(one, name))
    masks = cost("monte-carlo", 4)
    assert masks.parameters == parameters
    assert masks.train_flops == cost("dropout").train_flops
    assert masks.predict_flops > 4 * one.predict_flops
    # Half of the only hidden layer is not computed; drawing the mask costs nothing that counts.
    assert cost("dropout-thinned").train_flops < 0.7 * one.train_flops
    assert cost("dropout-thinned").predict_flops == one.predict_flops
    assert cost("small", 2).parameters <= parameters
    assert cost("wide").parameters <= 2 * parameters
    assert cost("wide").parameters > 1.8 * parameters
    # AdamW adds a multiple of each parameter; four decays were tried, for all candidate epochs.
    added = cost("weight-decay").train_flops - one.train_flops
    assert 0 < added < 4 * parameters * steps
    search = 4 * cost("weight-decay").train_flops
    assert cost("weight-decay").search_flops == pytest.approx(search)
    assert one.search_flops == 0
    assert cost("masksembles", 2).parameters == parameters


def at_epochs(predictions, epochs):
    """What a method predicts after so many epochs."""
    return next(each.outputs for each in predictions if each.epochs == epochs)


def test_scores_are_those_of_the_predictions_that_were_saved(finished, comparison):
    """Averages of probabilities formed in float64, all groups of neighbours on the circle."""
    run = RunFolder.open(finished[1])
    data = run.require("data", DataPart)
    labels, groups = data.test_labels, data.test_groups
    plain = at_epochs(run.require("plain", NetworksPart).methods["plain"], 2)
    probs = np.exp(plain.astype(np.float64))
    losses = []
    for size in (1, 2, 3):
        circle = [[(start + step) % 3 for step in range(size)] for start in range(3)]
        averages = np.stack([probs[:, members].mean(1) for members in circle])
        losses.append(-np.log(averages[..., np.arange(len(labels)), labels]).mean(0))
    curve = group_losses(np.stack(losses, 1), groups)
    same_epochs = {method.name: method for method in comparison.same_epochs}
    for index, point in enumerate(same_epochs["plain"].points):
        assert point.scores["nll"].mean == pytest.approx(curve[:, index].mean(), rel=1e-5)
        expected = crossed_interval(curve[:, index])
        assert point.scores["nll"].high == pytest.approx(expected.high, rel=1e-4)
    dropout = at_epochs(run.require("dropout", NetworksPart).methods["dropout"], 2)
    dropout = np.exp(dropout.astype(np.float64))
    one = group_losses(-np.log(dropout[..., np.arange(len(labels)), labels]).mean(1), groups)
    worth = EnsembleCurve(curve).equivalent(one)
    found = same_epochs["dropout"].point(1).worth["nll"]
    for name in ("value", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(worth, name), rel=1e-3)


def test_masks_of_one_network_are_averaged_and_differ(finished):
    run = RunFolder.open(finished[1])
    sampled = run.require("dropout", NetworksPart).methods["monte-carlo"][0].outputs
    assert sampled.shape[:2] == (2, 4)
    for first, second in itertools.combinations(range(4), 2):
        assert not np.array_equal(sampled[0, first], sampled[0, second])
    fixed = run.require("fixed-masks", NetworksPart).methods["fixed-masks"][0].outputs
    assert not np.array_equal(fixed[0, 0], fixed[0, 1])


def test_the_enumerated_network_tells_the_gaps(comparison):
    exact = comparison.exact
    assert exact.num_masks == 2**exact.num_units
    for score in ("nll", "brier", "error"):
        weight_scaling, geometric, arithmetic = (
            getattr(exact, name)[score].mean
            for name in ("weight_scaling", "geometric", "arithmetic")
        )
        assert exact.nonlinearity_gap[score].mean == pytest.approx(weight_scaling - geometric)
        assert exact.pool_gap[score].mean == pytest.approx(geometric - arithmetic)


def test_diversity_adds_up_and_stands_on_one_scale(comparison):
    assert {one.size for one in comparison.diversity} == {2}
    names = {one.method for one in comparison.diversity}
    assert {"plain", "dropout", "monte-carlo", "fixed-masks", "masksembles"} <= names
    for one in comparison.diversity:
        for parts in one.ambiguity.values():
            gained = parts.members.mean - parts.diversity.mean
            assert gained == pytest.approx(parts.pool.mean, abs=1e-5)
            assert parts.diversity.mean > 0


def test_the_claims_of_the_theory_have_numbers(comparison):
    assert {(one.networks, one.train_size) for one in comparison.overfitting} == {
        (kind, size) for kind in ("plain", "dropout") for size in (30, 60, 120)
    }
    for one in comparison.overfitting:
        gap = one.test["nll"].mean - one.train["nll"].mean
        assert one.gap["nll"].mean == pytest.approx(gap)
    for kind in ("plain", "dropout"):
        curve = comparison.learning_curves[kind]
        last = max(point.epochs for point in comparison.method(kind).points)
        assert curve.epochs == [*range(1, max(last, 2) + 1)]
        assert len(curve.test["nll"]) == len(curve.train["error"]) == len(curve.epochs)
        hidden = comparison.co_adaptation[kind]
        assert len(hidden.correlation) == 1
        assert len(hidden.deletion["nll"]) == len(hidden.deleted) == 11


def test_the_sweep_has_every_place(comparison):
    assert [cell.at for cell in comparison.sweep] == [{"rate": 0.2}, {"rate": 0.6}]
    first, second = comparison.sweep
    assert first.scores["plain"] == second.scores["plain"]
    assert first.scores["dropout"] != second.scores["dropout"]


@pytest.mark.slow
def test_evaluating_again_changes_nothing(finished, comparison):
    again = evaluation.evaluate(RunFolder.open(finished[1]))
    assert again.to_json() == comparison.to_json()
    margins = evaluation.evaluate(RunFolder.open(finished[1]), {"nll": 10.0})
    assert margins.margins["nll"] == 10
    # However wide the margin is, 2 replicates do not carry the claim.
    point = margins.method("dropout").point(1)
    assert point.against_ensemble["nll"].verdict == "refused"
    assert "There are 2 replicates: a claim needs at least 3" in " ".join(report.answer(margins))


def with_diverged(folder, copy, name, members):
    """A copy of a run in which networks of the first replicate have diverged."""
    shutil.copytree(folder, copy)
    run = RunFolder.open(copy)
    part = run.require(name, NetworksPart)
    for predictions in itertools.chain.from_iterable(part.methods.values()):
        for outputs in (predictions.outputs, predictions.ood_outputs):
            # One prediction may stand for all networks of a method, as with weight scaling.
            outputs[0, [member for member in members if member < outputs.shape[1]]] = np.nan
    run.store(name, part)
    return evaluation.evaluate(run)


@pytest.mark.slow
def test_a_network_that_diverged_is_counted_and_kept_out(finished, comparison, tmp_path):
    found = with_diverged(finished[1], tmp_path / "run", "plain", [1])
    plain = found.method("plain")
    assert [point.size for point in plain.points] == [1, 2]
    assert "1 diverged" in plain.title(2)
    assert (
        "diverged for 1 of 6 networks of the method 'plain': averages are of at most 2"
        in (found.left_out[0])
    )
    # One plain network stands for those that are left: here two in each replicate.
    outputs = at_epochs(
        RunFolder.open(finished[1]).require("plain", NetworksPart).methods["plain"], 2
    )
    labels = RunFolder.open(finished[1]).require("data", DataPart).test_labels
    left = np.stack([outputs[0, [0, 2]], outputs[1, [0, 1]]])
    losses = -left[..., np.arange(len(labels)), labels].astype(np.float64)
    same_epochs = {method.name: method for method in found.same_epochs}
    score = same_epochs["plain"].points[0].scores["nll"].mean
    assert score == pytest.approx(losses.mean(), rel=1e-3)
    # Nothing else has changed.
    dropout = comparison.method("dropout").points[0].scores["nll"]
    assert found.method("dropout").points[0].scores["nll"] == dropout
    report.write(found, tmp_path / "report")
    assert "1 diverged" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.slow
def test_a_method_whose_networks_diverged_is_left_out(finished, tmp_path):
    found = with_diverged(finished[1], tmp_path / "run", "wide", [0])
    assert "wide" not in {method.name for method in found.methods}
    assert "1 of 2 networks of the method 'wide': the method is left out" in found.left_out[0]
    report.write(found, tmp_path / "report")
    assert "'wide': the method is left out" in (tmp_path / "report" / "report.md").read_text()


def test_plain_networks_that_diverged_are_an_error(finished, tmp_path):
    with pytest.raises(DivergedError, match="2 plain networks predict NaN"):
        with_diverged(finished[1], tmp_path / "run", "plain", [0, 1])


def test_dropout_networks_that_all_diverged_are_an_error(finished, tmp_path):
    with pytest.raises(
        DivergedError, match=r"2 dropout networks predict NaN, .* fewer than 1 left"
    ):
        with_diverged(finished[1], tmp_path / "run", "dropout", [0, 1])


class Net(nn.Module):
    """A model with all that a run's identity must see: initialisers, and statistics of training."""

    kernel_init: Any = nn.initializers.lecun_normal()
    momentum: float = 0.9
    units: int = 4

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(self.units, kernel_init=self.kernel_init)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2)(x)


class Scaled(nn.Module):
    """A model whose width factor acts through `exponent`, which is without effect at 1."""

    exponent: float = 1.0
    width_factor: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(round(16 * self.width_factor**self.exponent))(x)
        return nn.Dense(2)(jdrop.linen.Dropout(0.5, deterministic=not train)(x))


@pytest.fixture(scope="module")
def data():
    inputs = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    labels = np.arange(20) % 2
    return from_arrays("x", inputs, labels, inputs, labels)


def test_equal_models_have_one_program_hash(data):
    assert hash_program(Model(lambda: Net()), data) == hash_program(Model(Net()), data)


@pytest.mark.parametrize(
    "changes",
    [{"kernel_init": nn.initializers.normal(3.0)}, {"momentum": 0.1}, {"units": 5}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_program_hash_sees_initialisers_and_what_training_alone_does(data, changes):
    assert hash_program(Model(Net(**changes)), data) != hash_program(Model(Net()), data)


def test_the_program_hash_sees_what_a_model_does_at_other_widths(data):
    def linear(width_factor=1.0):
        return Scaled(1.0, width_factor)

    def square_root(width_factor=1.0):
        return Scaled(0.5, width_factor)

    assert hash_program(Model(linear), data) != hash_program(Model(square_root), data)


def test_the_unit_of_the_targets_is_a_part_of_the_identity():
    inputs = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    targets = inputs.sum(1)
    model = Model(lambda: MLP((4,), 1))
    configs = []
    for unit in (1, 1024):  # A power of two, so that standardising gives the same floats.
        data = from_arrays("x", inputs, unit * targets, inputs, unit * targets)
        configs.append(run_config(Settings(), model, data, "MLP", {}))
    assert configs[0]["examples"] == configs[1]["examples"]
    assert configs[0] != configs[1]
    assert default_folder(configs[0]) != default_folder(configs[1])


def prepare(make_model, data, folder, **changes):
    """An experiment on a function of the caller's own, as `compare` prepares it."""
    arguments = {"margins": None, "sweep": None, "command": "compare"} | changes
    return Experiment(
        Settings(),
        Model(make_model),
        data,
        folder=folder,
        model_name=name_of(make_model),
        **arguments,
    )


def test_a_function_made_anew_goes_on_with_its_run(data, tmp_path):
    for _ in range(2):
        prepare(lambda: Net(), data, tmp_path)
    with pytest.raises(RunError, match="program is"):
        prepare(lambda: Net(momentum=0.1), data, tmp_path)


@pytest.mark.parametrize(
    "model",
    [lambda: None, functools.partial(print, sep=lambda: None), Net(kernel_init=lambda *_: 0)],
    ids=["lambda", "partial", "module"],
)
def test_the_name_of_a_model_holds_no_address(model):
    assert "0x" not in name_of(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margins": {"crps": 1.0}}, "margins must be of nll, .*, got crps"),
        ({"margins": {"nll": float("nan")}}, "the margin of nll must be a number above 0, got nan"),
        ({"sweep": {"rate": [0.1]}}, "rate cannot be swept"),
        ({"sweep": {"train_size": [21]}}, r"must lie in \[2, 20\], got 21"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_folder_is_made(data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(lambda: Net(), data, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_one_test_example_is_refused(tmp_path):
    inputs = np.zeros((4, 3), "float32")
    data = from_arrays("x", inputs, [0, 1, 0, 1], inputs[:1], [0])
    with pytest.raises(UserError, match="at least 2 test examples"):
        prepare(lambda: Net(), data, tmp_path / "run")


def test_the_run_holds_the_groups_and_the_baselines(finished):
    run = RunFolder.open(finished[1])
    data = run.require("data", DataPart)
    assert data.group_name == "writer's form"
    assert set(data.test_groups.tolist()) == set(range(14))
    linear, constant = run.require("baselines", BaselinesPart).baselines
    assert (linear.name, constant.name) == ("logistic-regression", "constant")
    assert linear.outputs.shape == constant.outputs.shape == (data.test_size, 10)
    assert "fitting a linear model: 6/6" in finished[0]


def compare_without_training(monkeypatch, comparison, **options):
    """Calls `compare` on toy data, with a run that calls its progress twice."""

    def run(self, progress, *, tensorboard):
        progress("training", 1, 2)
        progress("training", 2, 2)
        return comparison

    monkeypatch.setattr(Experiment, "run", run)
    inputs, labels = np.eye(4, dtype="float32"), np.array([0, 1, 0, 1])
    return jdrop.compare(Net(), inputs, labels, inputs, labels, **options)


def test_compare_shows_its_progress_unless_it_is_silenced(monkeypatch, comparison, capsys):
    assert compare_without_training(monkeypatch, comparison) is comparison
    assert capsys.readouterr() == ("", "training: 1/2\ntraining: 2/2\n")
    compare_without_training(monkeypatch, comparison, progress=False)
    assert capsys.readouterr() == ("", "")
    calls = []
    compare_without_training(monkeypatch, comparison, progress=lambda *call: calls.append(call))
    assert calls == [("training", 1, 2), ("training", 2, 2)]
    assert capsys.readouterr() == ("", "")


def test_compare_takes_groups(monkeypatch, comparison):
    def groups_of(data):
        return data.train_groups.tolist(), data.test_groups.tolist()

    given = []
    monkeypatch.setattr(
        "jdrop.study.comparison.check_model", lambda model, data: given.append(data)
    )
    options = {"groups": ["ann", "bob"] * 2, "test_groups": ["eve", "bob"] * 2, "progress": False}
    compare_without_training(monkeypatch, comparison, **options)
    assert groups_of(given[0]) == ([0, 1, 0, 1], [2, 1, 2, 1])
    with pytest.raises(UserError, match="test_groups must hold one group for each of the 4"):
        compare_without_training(monkeypatch, comparison, test_groups=[0, 1])
