"""The answer in a sentence."""

from jdrop.statistics import EnsembleEquivalent
from jdrop.study.results import Comparison, MethodResult, Point
from jdrop.study.scores import SCORES


def headline(comparison: Comparison) -> tuple[MethodResult, Point]:
    """Returns the subject of the sentence: one dropout network, else the first other method."""
    for method in comparison.methods:
        if method.name == "dropout":
            return method, method.points[0]
    method = next(method for method in comparison.methods if method.name != "plain")
    return method, method.points[-1]


def subject(method: MethodResult, point: Point) -> str:
    """Names a method at one size within a sentence."""
    if method.name == "dropout" and point.size == 1:
        return "one dropout network (weight scaling)"
    return method.title(point.size)


def sentence(comparison: Comparison) -> str:
    """Says how many networks one dropout network is worth, and at what cost."""
    method, point = headline(comparison)
    data = comparison.data
    size = "" if data["train_size"] is None else f" with {data['train_size']:,} training examples"
    noise = f", {data['label_noise']:.0%} of them mislabelled," if data["label_noise"] else ""
    main_score, *other_scores = comparison.curve_scores
    text = (
        f"On {data['name']}{size}{noise} {subject(method, point)} is worth "
        f"{in_words(point.worth[main_score])} independently trained networks in "
        f"{SCORES[main_score].title}"
    )
    cost, plain_cost = point.cost, comparison.method("plain").points[0].cost
    if cost is not None and plain_cost is not None:
        training = cost.train_flops / plain_cost.train_flops
        inference = cost.predict_flops / plain_cost.predict_flops
        text += f", for {training:.1f}x the training and {inference:.1f}x the inference cost of one"
    others = [f"{in_words(point.worth[score])} in {SCORES[score].title}" for score in other_scores]
    text += f"; {', '.join(others[:-1])} and {others[-1]}. "
    if not method.retrained:
        text += "The intervals are for this one network, not for training it anew. "
    return text + verdict_sentence(comparison, point)


def in_words(worth: EnsembleEquivalent) -> str:
    """Writes an equivalent as it stands within a sentence.

    Example:
        >>> in_words(EnsembleEquivalent(3.14, 2.4, 4.0, 10))
        '3.1 [2.4, 4.0]'
        >>> import math
        >>> in_words(EnsembleEquivalent(math.inf, 2.4, math.inf, 10))
        'more than 10 [2.4, >10]'
    """
    value, interval = str(worth).split(" ", 1)
    value = value.replace(">", "more than ").replace("≤1", "no more than one")
    return f"{value} {interval}"


def verdict_sentence(comparison: Comparison, point: Point) -> str:
    """Says whether a point is as good as the largest ensemble, by the test of equivalence."""
    score = comparison.curve_scores[0]
    test = point.against_ensemble[score]
    ensemble_size = comparison.ensemble.size
    margin = f"{test.margin:g} {SCORES[score].unit}".rstrip()
    title = SCORES[score].title
    against = f"the average of all {ensemble_size}"
    p_value = "TOST" if test.p_value is None else f"TOST, p {_p_value(test.p_value)}"
    return {
        "equivalent": f"In {title} it is enough: equivalent to {against} within {margin} "
        f"({p_value}).",
        "better": f"In {title} it is enough: better than {against} by more than {margin}.",
        "not worse": f"In {title} it is enough: not worse than {against} by as much as {margin} "
        "(one-sided test at 5 %), and it may be better by more.",
        "worse": f"In {title} it is not enough: worse than {against} by more than {margin}.",
        "undecided": f"Whether it is enough is undecided: in {title} it is not shown to be within "
        f"{margin} of {against} ({p_value}), nor to be beyond.",
        "refused": f"Whether it is enough is not said. {test.refusal}",
    }[test.verdict]


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"
