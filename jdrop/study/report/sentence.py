"""The answer in a few short paragraphs."""

import math

from jdrop.statistics import EnsembleEquivalent, Interval
from jdrop.study.report.choices import choice_of, resamples_text
from jdrop.study.report.numbers import (
    difference_text,
    ends_text,
    margin_text,
    mean_text,
    p_value_text,
    share_text,
)
from jdrop.study.results import Comparison, Cost, MethodResult, Point
from jdrop.study.scores import SCORES

VERDICTS = ("refused", "undecided", "worse", "not worse", "equivalent", "better")
ENOUGH = ("not worse", "equivalent", "better")
"""The verdicts of a method that is as good as the average of all plain networks, or better."""


def answer(comparison: Comparison) -> list[str]:
    """Returns the answer as short paragraphs.

    The first says how one dropout network differs from plain ones in the main score. The others
    hold the verdict, the second score, the controls that do as well, the worth in plain networks,
    the epochs and the cost.
    """
    if comparison.headline is None:
        return ["Only plain networks were compared."]
    method, point = comparison.headline
    scores = [comparison.curve_scores[0], second_score(comparison)]
    first, *others = [score for score in scores if score not in point.unreliable]
    paragraphs = [
        _differences(comparison, method, point, first),
        verdict_sentence(comparison, point),
        *[_second_differences(comparison, point, score) for score in others],
        *_controls(comparison, point),
        worth_sentence(comparison, method, point),
        _perplexities(comparison, method, point),
        _epochs(comparison, method, point),
        _costs(comparison, method, point),
    ]
    if not method.retrained:
        paragraphs.append("The intervals are for this one network, not for training it anew.")
    return [paragraph for paragraph in paragraphs if paragraph]


def subject(method: MethodResult, point: Point) -> str:
    """Names a method at one size within a sentence."""
    if method.name == "dropout" and point.size == 1:
        return "one dropout network"
    return method.title(point.size)


def second_score(comparison: Comparison) -> str:
    """The score that stands beside the main score: error, or the MSE in regression."""
    return "error" if comparison.task == "classification" else "mse"


def negated(difference: Interval) -> Interval:
    """The interval of the difference with its terms exchanged."""
    low, high = difference.low, difference.high
    return Interval(
        -difference.mean,
        None if high is None else -high,
        None if low is None else -low,
        difference.num_replicates,
    )


def _differences(comparison: Comparison, method: MethodResult, point: Point, score: str) -> str:
    data = comparison.data
    noun = "tokens" if comparison.is_per_token else "examples"
    size = "" if data["train_size"] is None else f" with {data['train_size']:,} training {noun}"
    noise = f", {data['label_noise']:.0%} of them mislabelled" if data["label_noise"] else ""
    from_single = difference_text(score, point.minus_single[score], unit=True)
    from_all = difference_text(score, point.minus_ensemble[score], unit=True)
    who = subject(method, point)
    if method.name == "dropout" and point.size == 1:
        who += " (weight scaling)"
    return (
        f"On {data['name']}{size}{noise}, {who} differs from one plain network by {from_single} in "
        f"{SCORES[score].title}, and from the average of all {comparison.ensemble.size} by "
        f"{from_all} (95 % intervals; less is better)."
    )


def verdict_sentence(comparison: Comparison, point: Point) -> str:
    """Says whether a point is as good as the largest ensemble, by the test of equivalence."""
    main_score = comparison.curve_scores[0]
    test = point.against_ensemble[main_score]
    title = SCORES[main_score].title
    if test.verdict == "refused":
        return f"Whether it is enough in {title} cannot be said. {test.refusal}"
    margin = f"a margin of {margin_text(main_score, test.margin)}"
    found = f"90 % interval {ends_text(main_score, test.difference)}"
    if p_value := p_value_text(test):
        found += f", p {p_value}" if p_value.startswith("<") else f", p = {p_value}"
    text = {
        "equivalent": f"In {title} it is enough within {margin}: it is equivalent to the average",
        "better": f"In {title} it is enough, with {margin}: it is better than the average by more "
        "than the margin",
        "not worse": f"In {title} it is enough within {margin}: it is not worse than the average "
        "by as much as the margin",
        "worse": f"In {title} it is not enough, with {margin}: it is worse than the average by "
        "more than the margin",
        "undecided": f"Whether it is enough in {title} is undecided, with {margin}: it may be "
        "worse than the average by more than the margin, or not",
    }[test.verdict]
    return f"{text} ({found})."


def _second_differences(comparison: Comparison, point: Point, score: str) -> str:
    """The differences in the second score, and the verdict unless it is refused."""
    from_single = difference_text(score, point.minus_single[score], unit=True)
    from_all = difference_text(score, point.minus_ensemble[score], unit=True)
    text = (
        f"In {SCORES[score].title} it differs from one plain network by {from_single}, and from "
        f"the average by {from_all}."
    )
    verdict = point.against_ensemble[score].verdict
    return text if verdict == "refused" else f"{text} The verdict is: {verdict}."


def worth_sentence(comparison: Comparison, method: MethodResult, point: Point) -> str:
    """Says how many plain networks a point is worth in the main score, if that is resolved."""
    score = comparison.curve_scores[0]
    worth = point.worth[score]
    largest = comparison.ensemble.size
    who = subject(method, point)
    is_worth = f"{who[0].upper()}{who[1:]} is worth"
    if not worth.is_resolved:
        text = f"How many plain networks {who} is worth is not resolved"
        if worth.refusal is not None:
            same = worth.refusal == point.against_ensemble[score].refusal
            return f"{text}." if same else f"{text}. {worth.refusal}"
        return f"{text}: the 95 % interval reaches from one network to more than {largest}."
    if worth.low == math.inf:
        return (
            f"{is_worth} more than {largest} plain networks: its {SCORES[score].title} is "
            f"significantly lower than that of the average of all {largest} (5 %)."
        )
    if worth.value == math.inf:
        return (
            f"{is_worth} at least {worth.low:.1f} plain networks (95 % interval), by the best "
            f"estimate more than {largest}."
        )
    if worth.value == 1:
        if worth.high < 1.05:  # It would read "at most 1.0".
            return f"{is_worth} no more than one plain network."
        return (
            f"{is_worth} at most {worth.high:.1f} plain networks (95 % interval), by the best "
            "estimate no more than one."
        )
    return f"{is_worth} {worth.value:.1f} plain networks (95 % interval {interval_of(worth)})."


def interval_of(worth: EnsembleEquivalent) -> str:
    """The interval of a resolved worth, such as "[2.4, >10]"."""
    return str(worth).split(" ", 1)[1]


def controls_that_do_as_well(comparison: Comparison) -> list[MethodResult]:
    """The controls that do as well as the headline's method, at the cost of one network."""
    if comparison.headline is None:
        return []
    _, point = comparison.headline
    score = comparison.curve_scores[0]
    return [
        method
        for method in comparison.methods
        if method.is_control
        and _costs_one_network(comparison, method, point)
        and _does_as_well(method.points[0], point, score)
    ]


def _controls(comparison: Comparison, point: Point) -> list[str]:
    """Names the controls that do as well at the cost of one network, and what they cost."""
    score = comparison.curve_scores[0]
    title = SCORES[score].title
    is_enough = point.against_ensemble[score].verdict in ENOUGH
    texts = []
    for method in controls_that_do_as_well(comparison):
        control = method.points[0]
        difference = difference_text(score, negated(control.minus_headline[score]), unit=True)
        text = (
            f"One network with {method.title(1)} {'is enough too' if is_enough else 'does better'}"
            f": its {title} is {mean_text(score, control.scores[score], unit=True)}, and dropout "
            f"minus it is {difference}."
        )
        if control.cost is not None and comparison.single.cost is not None:
            text += (
                f" Its training{_with_search(control.cost)} costs "
                f"{train_ratio(control, comparison):.1f}x that of one plain network."
            )
        texts.append(text)
    return texts


def _with_search(cost: Cost) -> str:
    return ", with the search," if cost.search_flops > 0 else ""


def _costs_one_network(comparison: Comparison, method: MethodResult, headline: Point) -> bool:
    """Whether a control is one network, no wider and no longer trained than the rule allows."""
    control = method.points[0]
    if len(method.points) != 1 or method.unit != "networks":
        return False
    if control.cost is None or headline.cost is None:
        return True
    is_wider = control.cost.parameters > 1.05 * headline.cost.parameters
    # Where each method has its own epochs, no method is trained longer than is best for it.
    is_longer = comparison.same_epochs is None and (control.epochs or 0) > (headline.epochs or 0)
    return not is_wider and not is_longer


def _does_as_well(control: Point, headline: Point, score: str) -> bool:
    """Whether a control reaches the headline's verdict, or is at least not told apart from it.

    Where the headline's method is not enough, the control must be better than it.
    """
    verdict, reached = (point.against_ensemble[score].verdict for point in (headline, control))
    difference = control.minus_headline[score]
    if verdict not in ENOUGH:
        return difference.high is not None and difference.high < 0
    not_told_apart = difference.low is not None and difference.low <= 0
    return reached in ENOUGH and (
        VERDICTS.index(reached) >= VERDICTS.index(verdict) or not_told_apart
    )


def _perplexities(comparison: Comparison, method: MethodResult, point: Point) -> str:
    if not comparison.is_per_token:
        return ""
    mine, single, ensemble = (
        mean_text("perplexity", each.scores["perplexity"])
        for each in (point, comparison.single, comparison.ensemble)
    )
    return (
        f"The perplexity per token is {mine} for {subject(method, point)}, {single} for one plain "
        f"network and {ensemble} for the average of all {comparison.ensemble.size}."
    )


def _epochs(comparison: Comparison, method: MethodResult, point: Point) -> str:
    epochs = [point.epochs, comparison.single.epochs, comparison.ensemble.epochs]
    if None in epochs:
        return ""
    if comparison.same_epochs is None:
        return f"All are trained for {epochs[0]} epochs." if len({*epochs}) == 1 else ""
    return (
        f"Each is trained for the epochs that cross-validation chose: {epochs[0]} for "
        f"{subject(method, point)}, {epochs[1]} for one plain network and {epochs[2]} for the "
        f"average.{_chosen_again(comparison, method, point)}"
    )


def _chosen_again(comparison: Comparison, method: MethodResult, point: Point) -> str:
    """In what share of resamples each of the three choices is made again."""
    sizes = [(method.name, point.size), ("plain", 1), ("plain", comparison.ensemble.size)]
    choices = [choice_of(comparison, name, size) for name, size in sizes]
    shares = [share_text(choice.chosen.share) for choice in choices if choice is not None]
    if len(shares) < len(sizes):
        return ""
    return (
        f" Of {resamples_text(comparison)}, {shares[0]}, {shares[1]} and {shares[2]} choose these "
        "epochs again."
    )


def _costs(comparison: Comparison, method: MethodResult, point: Point) -> str:
    cost, plain_cost = point.cost, comparison.single.cost
    if cost is None or plain_cost is None:
        return ""
    own_search = ", also with its search" if plain_cost.search_flops > 0 else ""
    return (
        f"The training of {subject(method, point)}{_with_search(cost)} costs "
        f"{train_ratio(point, comparison):.1f}x that of one plain network{own_search}. A "
        f"prediction costs {cost.predict_flops / plain_cost.predict_flops:.1f}x."
    )


def train_ratio(point: Point, comparison: Comparison) -> float:
    """FLOPs of the training and of its search, as a multiple of one plain network's."""
    cost, plain_cost = point.cost, comparison.single.cost
    assert cost is not None
    assert plain_cost is not None
    return (cost.train_flops + cost.search_flops) / (
        plain_cost.train_flops + plain_cost.search_flops
    )
