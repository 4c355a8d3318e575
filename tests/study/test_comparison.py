"""A whole comparison, as its user runs it: one tiny run of the script, and what it left."""

import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jdrop.statistics import EnsembleCurve, crossed_interval
from jdrop.study import evaluation, report
from jdrop.study.figures import FIGURES
from jdrop.study.results import COSTS, CURVE_SCORES, SCORES, Comparison
from jdrop.study.run import Run

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_ensembles.py"
TINY = ["--replicates", "2", "--ensemble-size", "3", "--budget", "2", "--num-samples", "4"]
TINY += ["--epochs", "2", "--hidden", "8", "--train-size", "120", "--batch-size", "20"]


@pytest.fixture(scope="module")
def run_command():
    spec = importlib.util.spec_from_file_location("compare_ensembles", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.run_command


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
    assert "one dropout network (weight scaling) is worth" in printed
    assert "enough" in printed
    for line in finished[0].splitlines():
        if not line.startswith("Written:"):
            assert len(line) <= 80


def test_every_method_is_there_with_its_sizes(comparison):
    sizes = {method.name: [point.size for point in method.points] for method in comparison.methods}
    assert sizes == {
        "plain": [1, 2, 3],
        "dropout": [1, 2],
        "monte-carlo": [1, 2, 3, 4],
        "dropout-thinned": [1],
        "small": [1, 2],
        "wide": [1],
        "long": [1],
        "early-stopping": [1],
        "weight-decay": [1],
        "fixed-masks": [1, 2],
        "masksembles": [1, 2],
    }
    assert comparison.replicates == 2
    for method, point in itertools.chain.from_iterable(
        [(method, point) for point in method.points] for method in comparison.methods
    ):
        assert {*point.worth} == {*point.against_ensemble} == {*CURVE_SCORES["classification"]}
        if point.size in method.table:
            assert {*point.scores} > {"ece", "debiased_ece", "aurc", "auroc_entropy"}
            assert ("mutual_information" in point.scores) == (point.size > 1)


def test_costs_are_those_of_the_networks(comparison):
    parameters = 64 * 8 + 8 + 8 * 10 + 10
    steps = 2 * 120 // 20

    def cost(name, size=1):
        return comparison.method(name).point(size).cost

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
    assert cost("long").train_flops == pytest.approx(2 * cost("dropout").train_flops)
    assert cost("small", 2).parameters <= parameters
    assert cost("wide").parameters <= 2 * parameters
    assert cost("wide").parameters > 1.8 * parameters
    search = 4 * cost("early-stopping").train_flops
    assert cost("weight-decay").train_flops == pytest.approx(search)
    assert cost("masksembles", 2).parameters == parameters


def test_scores_are_those_of_the_predictions_that_were_saved(finished, comparison):
    """Averages of probabilities formed in float64, all groups of neighbours on the circle."""
    run = Run.open(finished[1])
    labels = run.part("data").arrays["test_labels"]
    probs = np.exp(run.part("plain").arrays["outputs"].astype(np.float64))
    losses = []
    for size in (1, 2, 3):
        groups = [[(start + step) % 3 for step in range(size)] for start in range(3)]
        averages = np.stack([probs[:, group].mean(1) for group in groups])
        losses.append(-np.log(averages[..., np.arange(len(labels)), labels]).mean(0))
    curve = np.stack(losses, 1)
    for index, point in enumerate(comparison.method("plain").points):
        assert point.scores["nll"].mean == pytest.approx(curve[:, index].mean(), rel=1e-5)
        expected = crossed_interval(curve[:, index])
        assert point.scores["nll"].high == pytest.approx(expected.high, rel=1e-4)
    dropout = np.exp(run.part("dropout").arrays["outputs"].astype(np.float64))
    one = -np.log(dropout[..., np.arange(len(labels)), labels]).mean(1)
    worth = EnsembleCurve(curve).equivalent(one)
    found = comparison.method("dropout").point(1).worth["nll"]
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(worth), rel=1e-3)


def test_masks_of_one_network_are_averaged_and_differ(finished):
    run = Run.open(finished[1])
    sampled = run.part("dropout").arrays["sampled_outputs"]
    assert sampled.shape[:2] == (2, 4)
    for first, second in itertools.combinations(range(4), 2):
        assert not np.array_equal(sampled[0, first], sampled[0, second])
    fixed = run.part("fixed-masks").arrays["outputs"]
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
        assert curve.epochs == [1, 2]
        assert len(curve.test["nll"]) == len(curve.train["error"]) == 2
        hidden = comparison.co_adaptation[kind]
        assert len(hidden.correlation) == 1
        assert len(hidden.deletion["nll"]) == len(hidden.deleted) == 11


def test_the_sweep_has_every_place(comparison):
    assert [cell.at for cell in comparison.sweep] == [{"rate": 0.2}, {"rate": 0.6}]
    first, second = comparison.sweep
    assert first.scores["plain"] == second.scores["plain"]
    assert first.scores["dropout"] != second.scores["dropout"]


def test_evaluating_again_changes_nothing(finished, comparison):
    again = evaluation.evaluate(Run.open(finished[1]))
    assert again.to_json() == comparison.to_json()
    margins = evaluation.evaluate(Run.open(finished[1]), {"nll": 10.0})
    point = margins.method("dropout").point(1)
    assert point.against_ensemble["nll"].verdict == "equivalent"
    assert "equivalent to the average of all 3 within 10 nats" in report.sentence(margins)


def test_a_folder_of_an_earlier_version_is_drawn_again(
    finished, comparison, run_command, capsys, tmp_path
):
    folder = shutil.copytree(finished[1], tmp_path / "old")
    for name, key in (("run", "command"), ("plain", "activation_min")):
        path = folder / "parts" / f"{name}.json"
        facts = json.loads(path.read_text())
        facts.get("co_adaptation", facts).pop(key)
        path.write_text(json.dumps(facts))
    assert run_command(["report", str(folder)]) == 0, capsys.readouterr().err
    found = Comparison.from_json((folder / "results.json").read_text())
    assert found.command == "unknown"
    assert found.co_adaptation == comparison.co_adaptation


def test_every_file_is_whole_and_stands_alone(finished, comparison):
    out = finished[1]
    files = {path.name for path in out.iterdir() if path.is_file()}
    drawn = {f"{draw.__name__}.png" for draw in FIGURES.values() if draw(comparison)}
    assert {"score_against_cost.png", "worth_chart.png", "sweep.png", "exact.png"} <= drawn
    texts = {"results.json", "results.schema.json", "scores.csv", "report.md", "report.html"}
    assert files == drawn | texts | {"run.json"}
    page = (out / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page)
    assert "@import" not in page
    figures = re.findall(r'role="img"[^>]*aria-label="([^"]+)"', page)
    assert len(figures) == len(drawn)
    assert all(len(text) > 60 for text in figures)
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len({*identifiers})
    assert report.sentence(comparison)[:40] in page
    for name in drawn:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in (out / "report.md").read_text()


def test_the_table_for_programs_holds_every_score(finished, comparison):
    rows = list(csv.DictReader((finished[1] / "scores.csv").read_text().splitlines()))
    expected = sum(len(p.scores) for method in comparison.methods for p in method.points)
    assert len(rows) == expected
    row = next(r for r in rows if (r["method"], r["size"], r["score"]) == ("dropout", "1", "nll"))
    point = comparison.method("dropout").point(1)
    assert float(row["mean"]) == point.scores["nll"].mean
    assert float(row["worth_high"]) == point.worth["nll"].high
    assert row["verdict"] == point.against_ensemble["nll"].verdict
    assert float(row["train_flops"]) == point.cost.train_flops
    assert {row["score"] for row in rows} <= {*SCORES}


def test_json_comes_back_and_has_a_schema(finished, comparison):
    text = (finished[1] / "results.json").read_text()
    assert Comparison.from_json(text).to_json() == text
    assert json.loads(text)["methods"][0]["name"] == "plain"
    schema = json.loads((finished[1] / "results.schema.json").read_text())
    assert "networks" in schema["$defs"]["Method"]["description"]
    with pytest.raises(ValueError, match="JSON"):
        Comparison.from_json(text[: len(text) // 2])


def test_the_same_command_again_trains_nothing(finished, run_command, monkeypatch, capsys):
    monkeypatch.chdir(finished[1].parent)
    options = [*TINY, "--label-noise", "0.2", "--sweep", "rate=0.2,0.6", "--out", "out"]
    written = []
    monkeypatch.setattr(report, "write", lambda _, folder: written.append(folder) or [])
    assert run_command(options) == 0
    assert "training" not in capsys.readouterr().out.split("worth")[0]
    assert written == [Path("out")]


def test_another_run_in_the_same_folder_is_refused(finished, run_command, monkeypatch, capsys):
    monkeypatch.chdir(finished[1].parent)
    before = (finished[1] / "run.json").read_text()
    assert run_command([*TINY, "--out", "out", "--seed", "1"]) == 1
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert (finished[1] / "run.json").read_text() == before


def test_results_that_cannot_be_written_leave_the_table(finished, run_command, monkeypatch, capsys):
    """As on a full disk: the numbers are on the terminal, and the error says what is missing."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jdrop.study.report.write_text", full)
    assert run_command(["report", str(finished[1])]) == 1
    output = capsys.readouterr()
    assert "worth" in output.out
    assert "No space left on device" in output.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "1.5"], "'--rate': must lie in (0, 1), got 1.5"),
        (["--rate", "nan"], "'--rate': must lie in (0, 1), got nan"),
        (["--input-rate", "-0.1"], "'--input-rate': must lie in [0, 1), got -0.1"),
        (["--label-noise", "much"], "'--label-noise': must lie in [0, 1), got much"),
        (["--dataset", "nowhere.csv", "--target", "y"], "nowhere.csv"),
        (["--dataset", "nowhere.npz"], "nowhere.npz"),
        (["--target", "y"], "--target is for tables, not for digits"),
        (["--hidden", "256,x"], "'--hidden': must be positive numbers such as 256,256"),
        (["--replicates", "1"], "'--replicates'"),
        (["--epochs", "0"], "'--epochs'"),
        (["--learning-rate", "0"], "'--learning-rate'"),
        (["--learning-rate", "nan"], "learning_rate must be positive and finite, got nan"),
        (["--train-size", "5000"], "5000"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
        (["--ood", "cifar"], "ood must be one of"),
        (["--sweep", "depth=2"], "must be NAME=NUMBER"),
        (["--margin", "nll=1,2"], "must be NAME=NUMBER"),
        (["--model", "nowhere"], "--model must be MODULE:OBJECT"),
        (["--model", "nowhere:model"], "nowhere cannot be imported"),
        (["--model", "math:nothing"], "math has no nothing"),
        (["--model", "math:pi"], "the model must be a linen module"),
        (["--model", "math:pi", "--hidden", "16"], "--hidden is of the MLP"),
        (["--margin", "nll=-1"], "must be a number above 0"),
        (["--predictions", "nowhere.npz"], "nowhere.npz"),
        (["report", "nowhere"], "nowhere"),
        (["--colour", "blue"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_value_gets_one_line(run_command, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run_command(options) in (1, 2)
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
    assert run_command([*TINY, "--out", "file/below"]) in (1, 2)
    output = capsys.readouterr()
    assert "file" in output.err
    assert not output.out


def test_equivalents_read_well_in_a_sentence(comparison):
    point = comparison.method("dropout").point(1)
    test = point.against_ensemble["nll"]
    low = dataclasses.replace(test.difference, mean=-1.0, low=-1.1, high=-0.9)
    better = dataclasses.replace(
        point, against_ensemble={"nll": dataclasses.replace(test, difference=low)}
    )
    assert "better than the average of all 3" in report.verdict_sentence(comparison, better)
    wide = dataclasses.replace(test.difference, mean=0.0, low=-1.0, high=1.0)
    unclear = dataclasses.replace(
        point, against_ensemble={"nll": dataclasses.replace(test, difference=wide)}
    )
    assert "undecided" in report.verdict_sentence(comparison, unclear)
    assert not math.isnan(test.p_value)
