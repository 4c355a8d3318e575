"""The report of a made-up comparison: tables, figures, pages, and the JSON behind them."""

import csv
import dataclasses
import io
import itertools
import json
import re

import numpy as np
import pytest
from rich.console import Console

from jdrop.statistics import Interval
from jdrop.study import report
from jdrop.study.data import Predictions
from jdrop.study.errors import UserError
from jdrop.study.evaluation import of_predictions
from jdrop.study.report import page, tables
from jdrop.study.report.captions import TITLES, captions
from jdrop.study.report.figures import FIGURES
from jdrop.study.report.sentence import verdict_sentence
from jdrop.study.results import (
    Cell,
    CoAdaptation,
    Comparison,
    Cost,
    Exact,
    LearningCurve,
    Overfitting,
)
from jdrop.study.scores import COSTS, SCORES

NUM_EXAMPLES, NUM_CLASSES = 60, 3
ODD_NAME = "$x$ a{b} [red]c|d"


def log_probs_of(labels, count, seed):
    logits = np.random.default_rng(seed).normal(size=(count, NUM_EXAMPLES, NUM_CLASSES))
    logits += 2 * np.eye(NUM_CLASSES)[labels]
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


@pytest.fixture(scope="module")
def without_costs():
    """What `of_predictions` returns, with a method whose name holds every kind of markup."""
    labels = np.random.default_rng(0).integers(0, NUM_CLASSES, NUM_EXAMPLES).astype(np.int32)
    log_probs = {
        "plain": log_probs_of(labels, 6, 1),
        "dropout": log_probs_of(labels, 4, 2),
        "monte_carlo": log_probs_of(labels, 6, 3).reshape(2, 3, NUM_EXAMPLES, NUM_CLASSES),
        ODD_NAME: log_probs_of(labels, 1, 4),
    }
    return of_predictions(Predictions(log_probs, labels), "made up", 2)


@pytest.fixture(scope="module")
def comparison(without_costs):
    """The same with costs, theory, an enumeration and a sweep, so that every figure is drawn."""
    interval = Interval(0.5, 0.4, 0.6, 2)
    scores = {score: interval for score in ("nll", "brier", "error")}
    layers = {"Dropout_0": interval, "Dropout_1": interval}
    hidden_units = CoAdaptation(
        correlation=layers,
        zero_share=layers,
        sparseness=layers,
        activation_counts={"Dropout_0": [0.9, 0.1], "Dropout_1": [0.8, 0.2]},
        activation_min={"Dropout_0": 0.0, "Dropout_1": -1.0},
        activation_max={"Dropout_0": 1.0, "Dropout_1": 1.0},
        deleted=[0.0, 1.0],
        deletion={"nll": [0.5, 1.0]},
        features=[[0.0, 1.0, -1.0, 0.5]] * 3,
    )
    methods = [
        dataclasses.replace(
            method,
            points=[
                dataclasses.replace(
                    point, cost=Cost(float(point.size), 2.0, float(point.size), 0.1, 9, 36)
                )
                for point in method.points
            ],
        )
        for method in without_costs.methods
    ]
    dropout = without_costs.method("dropout").points[0]
    swept_scores = {"plain": dropout.scores, "ensemble": dropout.scores, "dropout": dropout.scores}
    both = ("plain", "dropout")
    return dataclasses.replace(
        without_costs,
        methods=methods,
        exact=Exact(4, 16, *[scores] * 5),
        overfitting=[
            Overfitting(networks, size, scores, scores, scores)
            for networks in both
            for size in (30, 60)
        ],
        learning_curves=dict.fromkeys(
            both, LearningCurve([1, 2], {"nll": [1.0, 0.5]}, {"nll": [1.1, 0.7]})
        ),
        co_adaptation=dict.fromkeys(both, hidden_units),
        sweep=[Cell({"rate": rate}, swept_scores, dropout.worth) for rate in (0.1, 0.5)],
    )


@pytest.fixture(scope="module")
def folder(comparison, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    report.write(comparison, out)
    return out


def test_every_file_is_complete_and_needs_no_other(folder, comparison):
    drawn = {f"{name}.png" for name in FIGURES}
    texts = {"results.json", "results.schema.json", "scores.csv", "report.md", "report.html"}
    assert {path.name for path in folder.iterdir()} == drawn | texts
    html = (folder / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html)
    assert "@import" not in html
    labels = re.findall(r'role="img"[^>]*aria-label="([^"]+)"', html)
    assert len(labels) == len(drawn)
    assert all(len(label) > 60 for label in labels)
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len({*identifiers})
    assert report.sentence(comparison)[:40] in html
    for name in drawn:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in (folder / "report.md").read_text()


def test_each_figure_has_a_title_and_a_caption(comparison):
    assert {*FIGURES} == {*TITLES} == {*captions(comparison)}


def test_figures_without_results_are_not_drawn(without_costs):
    drawn = {name for name, draw in FIGURES.items() if draw(without_costs) is not None}
    assert drawn == {"score_against_size", "worth_chart", "mask_curve", "diversity", "calibration"}


@pytest.mark.parametrize("names", [("rate", "train_size"), ("rate", "train_size", "label_noise")])
def test_a_sweep_of_several_settings_is_drawn_as_grids(comparison, names):
    template = comparison.sweep[0]
    cells = [
        dataclasses.replace(template, at=dict(zip(names, values, strict=True)))
        for values in itertools.product(*[(0.0, 0.1), (1.0, 2.0), (3.0, 4.0, 5.0)][: len(names)])
    ]
    figure = FIGURES["sweep"](dataclasses.replace(comparison, sweep=cells))
    visible = [axes for axes in figure.axes if axes.get_visible()]
    assert len(visible) == (1 if len(names) == 2 else 3)
    assert all(len(axes.texts) == 4 for axes in visible)


def test_a_name_with_markup_is_shown_as_it_is(folder, comparison):
    title = comparison.method(ODD_NAME).title(1)
    assert title == f"{ODD_NAME}, one"
    terminal = io.StringIO()
    Console(width=200, file=terminal).print(report.terminal(comparison))
    assert title in terminal.getvalue()
    assert title in (folder / "report.html").read_text()
    assert title.replace("|", r"\|") in (folder / "report.md").read_text()
    figure = FIGURES["worth_chart"](comparison)
    figure.canvas.draw()
    (label,) = (
        text.get_text() for text in figure.axes[0].get_yticklabels() if "x" in text.get_text()
    )
    assert label == title.replace("$", r"\$")


def test_unknown_costs_are_left_out(without_costs):
    rows = csv.DictReader(tables.scores_csv(without_costs).splitlines())
    assert all({row[name] for name in COSTS} == {""} for row in rows)
    for template in ("report.md.jinja", "report.html.jinja"):
        text = page.render(template, without_costs, [])
        assert "FLOPs" not in text
        assert "Each interval stands alone" in text
    assert "training FLOPs" not in tables.score_table(without_costs)[0]
    assert report.terminal(without_costs).columns[-1].header.strip() == "enough?"


def test_the_note_tells_rows_of_a_single_given_network(comparison):
    assert "A row without ± is of one given network" in tables.score_note(comparison)
    retrained = [dataclasses.replace(method, retrained=True) for method in comparison.methods]
    all_retrained = dataclasses.replace(comparison, methods=retrained)
    assert "given network" not in tables.score_note(all_retrained)


def test_the_csv_holds_every_score(folder, comparison):
    rows = list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))
    points = [point for method in comparison.methods for point in method.points]
    assert len(rows) == sum(len(point.scores) for point in points)
    row = next(r for r in rows if (r["method"], r["size"], r["score"]) == ("dropout", "1", "nll"))
    point = comparison.method("dropout").point(1)
    assert float(row["mean"]) == point.scores["nll"].mean
    assert float(row["worth_high"]) == point.worth["nll"].high
    assert row["verdict"] == point.against_ensemble["nll"].verdict
    assert float(row["train_flops"]) == point.cost.train_flops
    assert {row["score"] for row in rows} <= {*SCORES}


def test_json_comes_back_and_has_a_schema(folder):
    text = (folder / "results.json").read_text()
    assert Comparison.from_json(text).to_json() == text
    assert json.loads(text)["schema_version"] == 1
    assert json.loads(text)["methods"][0]["name"] == "plain"
    schema = json.loads((folder / "results.schema.json").read_text())
    assert "method" in schema["$defs"]["MethodResult"]["description"]


def test_unknown_costs_come_back_from_json(without_costs):
    text = without_costs.to_json()
    assert json.loads(text)["methods"][0]["points"][0]["cost"] is None
    assert Comparison.from_json(text).to_json() == text


def test_other_json_is_refused(folder):
    text = (folder / "results.json").read_text()
    with pytest.raises(UserError, match="results must be complete JSON"):
        Comparison.from_json(text[: len(text) // 2])
    for other in ({**json.loads(text), "schema_version": 2}, {}, []):
        with pytest.raises(UserError, match="must have the schema_version 1, got"):
            Comparison.from_json(json.dumps(other))


def test_a_comparison_is_shown_in_a_few_lines(comparison):
    lines = repr(comparison).splitlines()
    assert lines[0].startswith("Comparison on 'made up', classification, 2 replicates")
    worth = comparison.method("dropout").point(1).worth["nll"]
    assert lines[1] == f"  one dropout: {worth}"
    assert len(lines) < 10


def test_verdicts_are_put_into_words(comparison):
    point = comparison.method("dropout").point(1)
    test = point.against_ensemble["nll"]

    def sentence_for(low, mean, high):
        difference = dataclasses.replace(test.difference, mean=mean, low=low, high=high)
        changed = dataclasses.replace(test, difference=difference, refusal=None)
        changed_point = dataclasses.replace(point, against_ensemble={"nll": changed})
        return verdict_sentence(comparison, changed_point)

    assert "better than the average of all 3" in sentence_for(-1.1, -1.0, -0.9)
    assert "undecided" in sentence_for(-1.0, 0.0, 1.0)
