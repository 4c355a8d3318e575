"""The cautions of the report."""

import dataclasses

import made_up
import numpy as np
import pytest

from jdrop.statistics import Interval
from jdrop.study import report
from jdrop.study.analyses import LearningCurve, TuningCurve
from jdrop.study.report.choices import choices_table
from jdrop.study.report.numbers import signed_text, significant
from jdrop.study.report.tables import gains_and_losses
from jdrop.study.resampled_choices import choice_shares


@pytest.fixture(scope="module")
def comparison():
    return made_up.comparison()


@pytest.fixture(scope="module")
def regression():
    return made_up.comparison("regression")


def cautions_on(compared, words):
    return [text for text in report.cautions(compared) if words in text]


def test_refusals_of_other_rows_are_one_caution(comparison):
    reason = "A few test examples carry the difference."
    refused = made_up.with_refusal(
        made_up.with_refusal(comparison, "wide", reason), "weight-decay", reason
    )
    (caution,) = (text for text in report.cautions(refused) if reason in text)
    assert "weight decay and one wide plain are refused" in caution
    assert reason not in " ".join(report.answer(refused))


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
        "With the same 50 epochs, one plain (20) and 10 plain (30) would be past their best. "
        "Cross-validation chose the most epochs that it tried, 100, for one dropout: more may be "
        "better."
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


def with_resampled_choices(comparison, advantage, names=("plain", "dropout")):
    """Candidates of 20 and 30 epochs, scored on 400 simulated examples.

    Args:
        comparison: without shares.
        advantage: what the loss of 20 epochs is lower by, in standard errors of the difference.
        names: of the methods; other methods are sure of their choice.
    """
    noise = np.random.default_rng(0).normal(size=(2, 1, 400))
    noise -= noise[0].mean()
    difference = noise[1] - noise[0]
    error = difference.std() / np.sqrt(400)
    noise[1] += advantage * error - difference.mean()
    losses = (0.1 + 0.05 * noise) / 400
    shares = choice_shares(np.random.default_rng(1), losses)[:, 0].tolist()

    def curve(method, size):
        means = losses.sum((1, 2)).tolist() if method in names else [0.1, 0.2]
        found = shares if method in names else [1.0, 0.0]
        return TuningCurve(method, size, None, [20, 30], means, 20, found)

    curves = [curve("plain", 1), curve("plain", 10), curve("dropout", 1)]
    return dataclasses.replace(comparison, tuning=curves)


def test_candidates_that_are_equal_up_to_noise_are_a_caution(comparison):
    unsure = with_resampled_choices(comparison, 0.1, names=("dropout",))
    (text,) = cautions_on(unsure, "not sure of its choice")
    again, other = (round(100 * share) for share in unsure.tuning[-1].choice_shares)
    assert text == (
        "Cross-validation is not sure of its choice. For one dropout network it chose 20 epochs. "
        f"Of 1,000 resamples of the training examples, {again} % choose these again, and {other} % "
        "choose 30 epochs, where the left-out loss is 0.0003 nats higher. The intervals and the "
        "verdict do not include this chance. With the same 50 epochs for all methods the verdict "
        "is the same: not worse."
    )
    (both,) = cautions_on(with_resampled_choices(comparison, 0.1), "not sure of its choice")
    assert "For the average of 10 it chose 20 epochs. Of the resamples, " in both


def test_the_groups_that_are_resampled_have_their_name(regression):
    unsure = with_resampled_choices(regression, 0.1)
    grouped = dataclasses.replace(unsure, data={**unsure.data, "train_group_name": "person"})
    (text,) = cautions_on(grouped, "not sure of its choice")
    assert "Of 1,000 resamples of the training examples by person, " in text
    # Squared errors have no unit of their own here.
    assert "where the left-out loss is 0.000" in text
    assert "nats" not in text


def test_a_clear_choice_is_no_caution(comparison):
    assert not cautions_on(with_resampled_choices(comparison, 4.0), "not sure of its choice")
    # Nor is a choice of which an earlier version kept no shares.
    assert not cautions_on(comparison, "not sure of its choice")


def test_an_unsure_choice_leaves_another_verdict_to_its_own_caution(comparison):
    same = dataclasses.replace(comparison, methods=comparison.same_epochs)
    same = made_up.with_verdict(same, "dropout", 0.02, 0.03).methods
    changed = dataclasses.replace(with_resampled_choices(comparison, 0.1), same_epochs=same)
    texts = report.cautions(changed)
    (index,) = (i for i, text in enumerate(texts) if "not sure of its choice" in text)
    assert "the verdict is the same" not in texts[index]
    assert "the verdict is another one: worse" in texts[index + 1]


def test_the_answer_says_how_many_resamples_choose_it_again(comparison):
    clear = with_resampled_choices(comparison, 4.0)
    assert any(
        "Of 1,000 resamples of the training examples, 100 %, 100 % and 100 % choose these epochs "
        "again." in text
        for text in report.answer(clear)
    )
    assert not any("resamples" in text for text in report.answer(comparison))


def test_the_choice_has_a_row_with_the_most_frequent_other(comparison):
    header, (single, *_) = choices_table(with_resampled_choices(comparison, 0.1, ("plain",)))
    assert header[:4] == ["method", "chosen epochs", "loss", "share"]
    assert single[:3] == ["one plain", "20", "0.100"]
    assert single[4] == "30"
    assert int(single[3].split()[0]) + int(single[6].split()[0]) in (99, 100, 101)
    assert choices_table(comparison) == ([], [])


def test_another_verdict_at_the_same_epochs_is_said(comparison):
    assert not cautions_on(comparison, "the verdict is another one")
    same = dataclasses.replace(comparison, methods=comparison.same_epochs)
    same = made_up.with_verdict(same, "dropout", 0.02, 0.03).methods
    (text,) = cautions_on(dataclasses.replace(comparison, same_epochs=same), "another one")
    assert "With the same 50 epochs for all methods the verdict is another one: worse" in text


def test_two_verdicts_that_say_nothing_are_not_different(comparison):
    same = dataclasses.replace(comparison, methods=comparison.same_epochs)
    same = made_up.with_verdict(same, "dropout", -0.5, 0.5).methods
    refused = made_up.with_refusal(comparison, "dropout", "There are 2 replicates.")
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
    better = made_up.with_verdict(with_gain(comparison, 0.004), "dropout", -0.04, -0.02)
    assert not cautions_on(better, "The margin")
