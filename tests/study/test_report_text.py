"""What the report says in words: the sentence, the cautions, and the table in the terminal."""

import dataclasses
import io
import math

import made_up
import pytest
from rich.console import Console

from jdrop.statistics import EnsembleEquivalent, Interval
from jdrop.study import report
from jdrop.study.analyses import LearningCurve
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
from jdrop.study.report.tables import gains_and_losses
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
    first, verdict, *others = report.answer(comparison)
    assert first == (
        "On made up with 500 training examples, one dropout network (weight scaling) differs from "
        f"one plain network by {difference_text('nll', single['nll'], unit=True)} in NLL and "
        f"{difference_text('error', single['error'], unit=True)} in error. From the average of all "
        f"10 it differs by {difference_text('nll', ensemble['nll'])} nats in NLL and "
        f"{difference_text('error', ensemble['error'])} points in error (95 % intervals; less is "
        "better)."
    )
    assert verdict.startswith("In NLL it is enough within a margin of 0.01 nats: it is not worse")
    assert verdict.endswith("In error the verdict is: not worse.")
    assert [text.split(" ")[0] for text in others] == ["One", "Each", "The"]
    assert (
        "the epochs that cross-validation chose: 75 for one dropout network, 20 for one plain "
        "network and 20 for the average." in others[1]
    )
    assert "calibrated" not in words(comparison)


def test_the_answer_of_a_regression_speaks_of_the_mse(regression):
    assert "nats in calibrated NLL and" in words(regression)
    assert "in MSE" in words(regression)
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


def with_refusal(comparison, name, reason):
    point = comparison.method(name).points[0]
    tests = {
        score: dataclasses.replace(test, refusal=reason, p_value=None)
        for score, test in point.against_ensemble.items()
    }
    worth = {s: dataclasses.replace(w, refusal=reason) for s, w in point.worth.items()}
    return made_up.with_point(comparison, name, against_ensemble=tests, worth=worth)


def test_a_refusal_is_said_once(comparison):
    reason = "There are 2 replicates: a claim needs at least 3."
    refused = comparison
    for name in ("dropout", "weight-decay", "wide"):
        refused = with_refusal(refused, name, reason)
    everything = " ".join([*report.answer(refused), *report.cautions(refused)])
    assert everything.count(reason) == 1
    assert f"Whether it is enough in NLL cannot be said. {reason}" in everything
    assert "How many plain networks one dropout network is worth is not resolved." in everything


def test_refusals_of_other_rows_are_one_caution(comparison):
    reason = "A few test examples carry the difference."
    refused = with_refusal(with_refusal(comparison, "wide", reason), "weight-decay", reason)
    (caution,) = (text for text in report.cautions(refused) if reason in text)
    assert "weight decay and one wide plain are refused" in caution
    assert reason not in words(refused)


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


def with_verdict(comparison, name, low, high):
    """A method whose 90 % interval against all plain networks is changed."""
    point = comparison.method(name).points[0]
    test = point.against_ensemble["nll"]
    difference = Interval((low + high) / 2, low, high, 5)
    changed = dataclasses.replace(test, difference=difference, p_value=0.01)
    tests = {**point.against_ensemble, "nll": changed}
    return made_up.with_point(comparison, name, against_ensemble=tests)


def test_the_answer_names_a_control_that_does_as_well(comparison):
    assert "weight decay" not in words(comparison)
    control = comparison.method("weight-decay").points[0]
    minus = control.minus_headline["nll"]
    negated = Interval(-minus.mean, -minus.high, -minus.low, 5)
    as_good = with_verdict(comparison, "weight-decay", -0.02, 0.005)
    cost, plain = control.cost, comparison.single.cost
    ratio = (cost.train_flops + cost.search_flops) / (plain.train_flops + plain.search_flops)
    assert (
        "One network with weight decay is enough too: its NLL is 0.203 nats, and dropout minus it "
        f"is {difference_text('nll', negated, unit=True)}. Its training, with the search, costs "
        f"{ratio:.1f}x that of one plain network." in words(as_good)
    )


def test_a_control_that_costs_several_networks_is_not_named(comparison):
    wide = with_verdict(comparison, "wide", -0.02, 0.005)
    assert "wide" not in words(wide)


def test_a_control_without_the_verdict_is_named_only_if_it_is_better(comparison):
    worse = with_verdict(comparison, "dropout", 0.02, 0.03)
    assert "weight decay" not in words(worse)
    minus = {"nll": Interval(-0.02, -0.03, -0.01, 5)}
    better = made_up.with_point(worse, "weight-decay", minus_headline=minus)
    assert "One network with weight decay does better: its NLL is 0.203 nats" in words(better)


def cautions_on(compared, words):
    return [text for text in report.cautions(compared) if words in text]


def test_a_simple_model_that_beats_networks_leads_the_cautions(regression):
    baseline = regression.method("logistic-regression").points[0]
    better = Interval(-1200.0, -1400.0, -1000.0, 5)
    scores = {**baseline.scores, "mse": Interval(900.0, 800.0, 1000.0, 5)}
    changed = made_up.with_point(
        regression,
        "logistic-regression",
        scores=scores,
        minus_single={"mse": better},
        minus_ensemble={"mse": Interval(-100.0, -300.0, 100.0, 5)},
        minus_headline={"mse": Interval(20.0, -100.0, 140.0, 5)},
    )
    first = report.cautions(changed)[0]
    single = significant(regression.single.scores["mse"].mean)
    ensemble = significant(regression.ensemble.scores["mse"].mean)
    assert first.startswith(
        f"Logistic regression has a lower MSE, 900, than one plain network ({single}) and the "
        f"average of 10 ({ensemble}; not significant). Networks that a simple model beats"
    )


def test_a_simple_model_that_beats_no_network_is_not_mentioned(comparison):
    assert not cautions_on(comparison, "simple model")


def test_choices_beside_the_epochs_of_the_settings_are_one_caution(comparison):
    (text,) = cautions_on(comparison, "50 epochs")
    assert text == (
        "With the same 50 epochs, one plain (20) and 10 plain (30) would be past their best. The "
        "choice of one dropout is the last candidate, 100 epochs: more may be better."
    )


def test_a_long_list_of_methods_is_shortened(comparison):
    template = comparison.tuning[0]
    names = ("plain", "dropout", "monte-carlo", "weight-decay", "early-stopping", "wide")
    tuning = [
        dataclasses.replace(template, method=name, size=comparison.method(name).table[0])
        for name in names
    ]
    (text,) = cautions_on(dataclasses.replace(comparison, tuning=tuning), "50 epochs")
    assert "one plain (20); one dropout (20); dropout, 50 masks (20) and 3 others would" in text


def test_without_tuning_the_learning_curves_tell_the_wrong_length(comparison):
    epochs = list(range(1, 41))

    def curve(losses):
        return LearningCurve(epochs, {"nll": losses}, {"nll": losses})

    curves = {
        "plain": curve([1.0 + 0.01 * abs(epoch - 20) for epoch in epochs]),
        "dropout": curve([2.0 - 0.02 * epoch for epoch in epochs]),
    }
    # The weight decay has curves of the cross-validation without tuning too.
    untuned = dataclasses.replace(comparison, same_epochs=None, learning_curves=curves)
    (text,) = cautions_on(untuned, "40 epochs")
    assert "By their test loss, plain networks (20) were past their best at 40 epochs." in text
    assert "dropout networks were still improving." in text
    flat = dict.fromkeys(("plain", "dropout"), curve([1.0] * 40))
    steady = dataclasses.replace(untuned, learning_curves=flat)
    assert not cautions_on(steady, "40 epochs")


def test_another_verdict_at_the_same_epochs_is_said(comparison):
    assert not cautions_on(comparison, "the verdict is another one")
    same = dataclasses.replace(comparison, methods=comparison.same_epochs)
    same = with_verdict(same, "dropout", 0.02, 0.03).methods
    (text,) = cautions_on(dataclasses.replace(comparison, same_epochs=same), "another one")
    assert "With the same 50 epochs for all methods the verdict is another one: worse" in text


def test_two_verdicts_that_say_nothing_are_not_different(comparison):
    same = dataclasses.replace(comparison, methods=comparison.same_epochs)
    same = with_verdict(same, "dropout", -0.5, 0.5).methods
    refused = with_refusal(comparison, "dropout", "There are 2 replicates.")
    refused = dataclasses.replace(refused, same_epochs=same)
    assert not cautions_on(refused, "the verdict is another one")


def test_the_influence_says_how_few_examples_carry_the_difference(comparison):
    found = comparison.influence[1]
    (text,) = cautions_on(comparison, "Half of the mean difference")
    assert (
        f"on {100 * found.share_better:.0f} % of the test examples, and the average of 10" in text
    )
    assert f"{signed_text('nll', found.difference)} nats, comes from {found.half} examples." in text
    assert text.endswith(
        "Without the 5 examples that contribute most to the difference, it is "
        f"{signed_text('nll', found.without['5'])} nats."
    )


def test_gains_and_losses_add_up_to_the_difference(comparison):
    found = comparison.influence[1]
    gains = sum(value for value in found.differences if value < 0) / made_up.EXAMPLES
    losses = sum(value for value in found.differences if value > 0) / made_up.EXAMPLES
    assert gains_and_losses(found) == pytest.approx((gains, losses))
    (text,) = cautions_on(comparison, "add up to")
    assert (
        f"The examples that favour one dropout network add up to {signed_text('nll', gains)} nats, "
        f"the others to {signed_text('nll', losses)}." in text
    )
    cancelled = dataclasses.replace(found, cumulative=[-0.0215, -0.0062], difference=-0.0062)
    cancelled = dataclasses.replace(comparison, influence=[cancelled])
    assert cautions_on(
        cancelled,
        "Gains and losses nearly cancel: the examples that favour one dropout network add up to "
        "−0.0215 nats, the others to +0.0153.",
    )


def with_groups(comparison, **data):
    influence = [
        dataclasses.replace(
            found, largest_group="7", largest_group_share=0.74, without_largest_group=-0.0012
        )
        for found in comparison.influence
    ]
    data = {**comparison.data, "group_name": "writer", "num_groups": 13, **data}
    return dataclasses.replace(comparison, data=data, influence=influence)


def test_groups_are_named_or_examples_are_said_to_be_independent(comparison):
    (text,) = cautions_on(comparison, "independent")
    assert "take the test examples as independent" in text
    grouped = with_groups(comparison)
    (text,) = cautions_on(grouped, "independent")
    assert "13 groups by writer" in text
    assert "known groups" not in text
    assert cautions_on(grouped, "; without writer 7, it is −0.0012 nats.")


def test_groups_with_training_examples_are_known(comparison):
    (text,) = cautions_on(with_groups(comparison, groups_in_training=True), "independent")
    assert text.endswith(
        "The groups have training examples too, so the results are for known groups, not for new "
        "ones."
    )


def with_gain(comparison, gain):
    """All plain networks gain so much in the main score over one."""
    minus = {"nll": Interval(gain, 0.5 * gain, 1.5 * gain, 5)}
    return made_up.with_point(comparison, "plain", minus_ensemble=minus)


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (0.0095, "about as large as what averaging 10 plain networks gains (0.0095 nats)"),
        (0.0124, "about as large as what averaging 10 plain networks gains (0.0124 nats)"),
        (0.004, "larger than what averaging 10 plain networks gains (0.0040 nats)"),
        (-0.001, "larger than what averaging 10 plain networks gains (−0.0010 nats)"),
    ],
)
def test_a_margin_as_large_as_what_the_average_gains_is_a_caution(comparison, gain, expected):
    (text,) = cautions_on(with_gain(comparison, gain), "The margin")
    assert text == (
        f"The margin, 0.01 nats, is {expected}. Within this margin, “enough” does not show that "
        "one dropout network beats one plain network."
    )


def test_a_small_margin_or_a_method_that_is_better_by_more_needs_no_caution(comparison):
    assert not cautions_on(with_gain(comparison, 0.0126), "The margin")
    better = with_verdict(with_gain(comparison, 0.004), "dropout", -0.04, -0.02)
    assert not cautions_on(better, "The margin")


def printed(compared, width=80):
    text = io.StringIO()
    Console(width=width, file=text).print(report.terminal(compared))
    return text.getvalue().splitlines()


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_terminal_table_fits_80_columns(task):
    compared = made_up.comparison(task)
    lines = printed(compared)
    assert max(len(line.rstrip()) for line in lines) <= 80
    # Nothing is cut off: a wide terminal shows the same words.
    words, wide = (" ".join(" ".join(shown).split()) for shown in (lines, printed(compared, 300)))
    assert words.replace("─", "") == wide.replace("─", "")
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
