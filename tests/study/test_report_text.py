"""What the report says in words: its numbers, the answer, and the table in the terminal."""

import dataclasses
import io
import math

import made_up
import pytest
from rich.console import Console

from jdrop.statistics import EnsembleEquivalent, Interval
from jdrop.study import report
from jdrop.study.report.numbers import (
    clipped,
    difference_text,
    interval_text,
    margin_text,
    p_value_text,
    score_text,
    signed_text,
    significant,
)
from jdrop.study.report.sentence import verdict_sentence, worth_sentence
from jdrop.study.report.terminal import COST_NOTE

INF = math.inf


@pytest.fixture(scope="module")
def comparison():
    return made_up.comparison()


@pytest.fixture(scope="module")
def regression():
    return made_up.comparison("regression")


def words(comparison):
    """The answer as one text."""
    return " ".join(report.answer(comparison))


def test_numbers_have_three_significant_digits():
    texts = {
        0.12314: "0.123",
        0.99961: "1.00",
        12.345: "12.3",
        4852.967: "4850",
        0.00721: "0.00721",
        -0.0138: "−0.0138",
        0.0: "0",
        3e-12: "3.00e-12",
        9_994_999.0: "9990000",
        -1.0721e13: "−1.07e13",
        math.nan: "n/a",
    }
    assert {value: significant(value) for value in texts} == texts


def test_intervals_of_proportions_stay_within_0_and_100():
    beyond = Interval(0.0002, -0.001, 0.0014, 5)
    assert score_text("error", beyond) == "0.02 [0.00, 0.14]"
    assert clipped("error", beyond) == Interval(0.0002, 0.0, 0.0014, 5)
    # NLL is no proportion.
    assert clipped("nll", beyond) == beyond
    assert "-" not in score_text("ece", beyond)


def test_a_skewed_interval_shows_its_ends():
    assert interval_text(Interval(0.25, 0.2, 0.3, 5)) == "0.250±0.050"
    assert interval_text(Interval(0.25, 0.22, 0.3, 5)) == "0.250 [0.220, 0.300]"


def test_a_half_width_shows_at_least_one_digit():
    assert interval_text(Interval(0.123, 0.12296, 0.12304, 5)) == "0.123±0.00004"
    assert interval_text(Interval(0.117, 0.117 - 1e-17, 0.117 + 1e-17, 5)) == "0.117"


def test_a_rounded_zero_has_no_sign():
    assert difference_text("nll", Interval(-0.00001, -0.5, 0.5, 5)) == "0.000 [−0.500, +0.500]"
    assert signed_text("nll", -1e-9) == "0.0000"


def test_differences_of_percentages_are_in_points():
    interval = Interval(0.00154, -0.0051, 0.0081, 5)
    assert difference_text("error", interval, unit=True) == "+0.15 [−0.51, +0.81] points"
    assert margin_text("error", 0.005) == "0.5 points"
    assert margin_text("mse", 61.23) == "61.2"


def test_the_answer_leads_with_the_differences(comparison):
    point = comparison.method("dropout").point(1)
    single, ensemble = point.minus_single, point.minus_ensemble
    first, verdict, second, *others = report.answer(comparison)
    assert first == (
        "On made up with 500 training examples, one dropout network (weight scaling) differs from "
        f"one plain network by {difference_text('nll', single['nll'])} nats in NLL, and from the "
        f"average of all 10 by {difference_text('nll', ensemble['nll'])} nats (95 % intervals; "
        "less is better)."
    )
    assert verdict.startswith("In NLL it is enough within a margin of 0.01 nats: it is not worse")
    assert second == (
        f"In error it differs from one plain network by {difference_text('error', single['error'])}"
        f" points, and from the average by {difference_text('error', ensemble['error'])} points. "
        "The verdict is: not worse."
    )
    assert [text.split(" ")[0] for text in others] == ["One", "Each", "The"]
    assert (
        "the epochs that cross-validation chose: 75 for one dropout network, 20 for one plain "
        "network and 20 for the average." in others[1]
    )
    assert "calibrated" not in words(comparison)


def test_the_answer_of_a_regression_speaks_of_the_mse(regression):
    assert "nats in calibrated NLL, and" in words(regression)
    assert "In MSE it differs" in words(regression)
    assert "error" not in words(regression)


def test_an_unreliable_score_is_not_in_the_sentence(regression):
    changed = made_up.with_point(regression, "dropout", unreliable=["mse"])
    assert "MSE" not in words(changed)


def test_costs_include_the_search(comparison):
    cost = comparison.method("dropout").point(1).cost
    plain = comparison.single.cost
    ratio = (cost.train_flops + cost.search_flops) / (plain.train_flops + plain.search_flops)
    assert words(comparison).endswith(
        f"The training of one dropout network, with the search, costs {ratio:.1f}x that of one "
        "plain network, also with its search. A prediction costs 1.0x."
    )
    assert "cost" not in words(made_up.without_costs(comparison))


def test_costs_without_a_search_do_not_speak_of_one(comparison):
    unsearched = comparison
    for name in ("plain", "dropout"):
        cost = dataclasses.replace(comparison.method(name).points[0].cost, search_flops=0.0)
        unsearched = made_up.with_point(unsearched, name, cost=cost)
    assert "The training of one dropout network costs 3.8x that of one plain network. A" in words(
        unsearched
    )


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (
            2.31,
            2.0,
            2.7,
            "One dropout network is worth 2.3 plain networks (95 % interval [2.0, 2.7]).",
        ),
        (
            2.31,
            1.0,
            2.7,
            "One dropout network is worth 2.3 plain networks (95 % interval [≤1, 2.7]).",
        ),
        (
            2.31,
            2.0,
            INF,
            "One dropout network is worth 2.3 plain networks (95 % interval [2.0, >10]).",
        ),
        (
            INF,
            3.8,
            INF,
            "One dropout network is worth at least 3.8 plain networks (95 % interval), by the best",
        ),
        (
            INF,
            INF,
            INF,
            "One dropout network is worth more than 10 plain networks: its NLL is significantly "
            "lower than that of the average of all 10 (5 %).",
        ),
        (
            1.0,
            1.0,
            1.8,
            "One dropout network is worth at most 1.8 plain networks (95 % interval), by the best",
        ),
        (1.0, 1.0, 1.0, "One dropout network is worth no more than one plain network."),
        (INF, 1.0, INF, "is not resolved: the 95 % interval reaches from one network to more than"),
        (2.31, 1.0, INF, "is not resolved: the 95 % interval reaches from one network to more"),
    ],
)
def test_a_worth_is_said_only_as_far_as_it_is_resolved(comparison, value, low, high, expected):
    point = comparison.method("dropout").point(1)
    changed = dataclasses.replace(point, worth={"nll": EnsembleEquivalent(value, low, high, 10)})
    assert expected in worth_sentence(comparison, comparison.method("dropout"), changed)


def test_a_refusal_is_said_once(comparison):
    reason = "There are 2 replicates: a claim needs at least 3."
    refused = comparison
    for name in ("dropout", "weight-decay", "wide"):
        refused = made_up.with_refusal(refused, name, reason)
    everything = " ".join([*report.answer(refused), *report.cautions(refused)])
    assert everything.count(reason) == 1
    assert f"Whether it is enough in NLL cannot be said. {reason}" in everything
    assert "How many plain networks one dropout network is worth is not resolved." in everything
    assert "The verdict is" not in everything


def test_verdicts_are_put_into_words(comparison):
    point = comparison.method("dropout").point(1)
    test = point.against_ensemble["nll"]

    def sentence_for(low, mean, high, p_value):
        difference = dataclasses.replace(test.difference, mean=mean, low=low, high=high)
        changed = dataclasses.replace(test, difference=difference, p_value=p_value)
        tests = {**point.against_ensemble, "nll": changed}
        return verdict_sentence(comparison, dataclasses.replace(point, against_ensemble=tests))

    better = sentence_for(-1.1, -1.0, -0.9, 1e-9)
    assert better == (
        "In NLL it is enough, with a margin of 0.01 nats: it is better than the average by more "
        "than the margin (90 % interval [−1.10, −0.90], p < 0.001)."
    )
    worse = sentence_for(0.02, 0.03, 0.04, 0.04)
    assert "In NLL it is not enough, with a margin of 0.01 nats: it is worse than" in worse
    assert worse.endswith("(90 % interval [+0.0200, +0.0400], p = 0.04).")
    equivalent = sentence_for(-0.002, 0.001, 0.004, 0.01)
    assert (
        "enough within a margin of 0.01 nats: it is equivalent to the average (90 %" in equivalent
    )
    undecided = sentence_for(-1.0, 0.0, 1.0, None)
    assert "enough in NLL is undecided, with a margin of 0.01 nats" in undecided
    assert undecided.endswith("(90 % interval [−1.00, +1.00]).")


def test_only_a_verdict_that_says_something_has_a_p_value(comparison):
    test = comparison.method("dropout").point(1).against_ensemble["nll"]
    assert p_value_text(dataclasses.replace(test, p_value=None)) == ""
    assert p_value_text(dataclasses.replace(test, p_value=0.0312)) == "0.031"


def test_the_answer_names_a_control_that_does_as_well(comparison):
    assert "weight decay" not in words(comparison)
    control = comparison.method("weight-decay").points[0]
    minus = control.minus_headline["nll"]
    negated = Interval(-minus.mean, -minus.high, -minus.low, 5)
    as_good = made_up.with_verdict(comparison, "weight-decay", -0.02, 0.005)
    # Its search tries several weight decays.
    cost = dataclasses.replace(control.cost, search_flops=4 * control.cost.search_flops)
    as_good = made_up.with_point(as_good, "weight-decay", cost=cost)
    plain = comparison.single.cost
    ratio = (cost.train_flops + cost.search_flops) / (plain.train_flops + plain.search_flops)
    assert (
        "One network with weight decay is enough too: its NLL is 0.203 nats, and dropout minus it "
        f"is {difference_text('nll', negated, unit=True)}. Its training, with the search, costs "
        f"{ratio:.1f}x that of one plain network." in words(as_good)
    )


def test_a_control_that_costs_several_networks_is_not_named(comparison):
    wide = made_up.with_verdict(comparison, "wide", -0.02, 0.005)
    assert "wide" not in words(wide)


def test_a_control_without_the_verdict_is_named_only_if_it_is_better(comparison):
    worse = made_up.with_verdict(comparison, "dropout", 0.02, 0.03)
    assert "weight decay" not in words(worse)
    minus = {"nll": Interval(-0.02, -0.03, -0.01, 5)}
    better = made_up.with_point(worse, "weight-decay", minus_headline=minus)
    assert "One network with weight decay does better: its NLL is 0.203 nats" in words(better)


def printed(compared, width=80):
    text = io.StringIO()
    Console(width=width, file=text).print(report.terminal(compared))
    return text.getvalue().splitlines()


def with_larger_scores(compared, factor):
    """As where trainings diverge, or targets have a small unit."""

    def larger(intervals):
        ends = ("mean", "low", "high")
        return {
            score: dataclasses.replace(
                interval, **{end: factor * getattr(interval, end) for end in ends}
            )
            if score in compared.curve_scores and score != "error"
            else interval
            for score, interval in intervals.items()
        }

    names = ("scores", "minus_single", "minus_ensemble")
    methods = [
        dataclasses.replace(
            method,
            points=[
                dataclasses.replace(point, **{name: larger(getattr(point, name)) for name in names})
                for point in method.points
            ],
        )
        for method in compared.methods
    ]
    return dataclasses.replace(compared, methods=methods)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("factor", [1, 1e4, 1e13])
def test_the_terminal_table_fits_80_columns(task, factor):
    compared = with_larger_scores(made_up.comparison(task), factor)
    lines = printed(compared)
    assert max(len(line.rstrip()) for line in lines) <= 80
    # Nothing is cut off: a wide terminal shows the same words.
    words, wide = (" ".join(shown).replace("─", "") for shown in (lines, printed(compared, 300)))
    assert sorted(words.split()) == sorted(wide.split())
    assert "…" not in words


def test_the_terminal_table_has_differences_before_the_worth(comparison):
    point = comparison.method("dropout").point(1)
    (row,) = (line for line in printed(comparison) if line.startswith("one dropout"))
    assert row.split() == [
        *("one", "dropout", "7.25", "0.197"),
        f"{point.minus_single['nll'].mean:+.3f}".replace("-", "−"),
        f"{point.minus_ensemble['nll'].mean:+.3f}".replace("-", "−"),
        *str(point.worth["nll"]).split(),
        *("not", "worse", "3.8", "1.0"),
    ]


def test_weight_scaling_of_the_same_networks_follows_the_masks(comparison):
    lines = printed(comparison)
    (index,) = (i for i, line in enumerate(lines) if line.startswith("dropout, 50 masks"))
    assert lines[index + 1].startswith("same, no masks")


def test_a_worth_without_information_is_not_resolved(comparison):
    worth = {"nll": EnsembleEquivalent(INF, 1.0, INF, 10)}
    changed = made_up.with_point(comparison, "dropout", worth=worth)
    assert any("one dropout" in line and "not resolved" in line for line in printed(changed))


def test_unknown_costs_leave_no_note(comparison):
    assert COST_NOTE not in str(report.terminal(made_up.without_costs(comparison)).caption)
    assert COST_NOTE in str(report.terminal(comparison).caption)
