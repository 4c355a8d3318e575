"""The titles and captions of the figures, with their main numbers."""

from jdrop.statistics import Interval
from jdrop.study.analyses import CoAdaptation, Exact, Overfitting
from jdrop.study.report.numbers import (
    MAX_NATS_DECIMALS,
    difference_text,
    interval_text,
    score_text,
)
from jdrop.study.report.sentence import negated, subject
from jdrop.study.results import Comparison
from jdrop.study.scores import SCORES

TITLES = {
    "difference": "Difference to all plain networks",
    "score_against_cost": "Score against cost",
    "score_against_size": "What worth means",
    "worth_chart": "What each method is worth",
    "example_differences": "Which examples carry the difference",
    "tuning": "Epochs chosen by cross-validation",
    "score_against_other_costs": "Score against other costs",
    "mask_curve": "How many masks",
    "exact": "All masks of a small network",
    "overfitting": "Overfitting",
    "learning_curves": "Learning curves",
    "diversity": "Why averages are better",
    "calibration": "Calibration and selective prediction",
    "co_adaptation": "Co-adaptation",
    "features": "First-layer weights",
    "sweep": "Worth by swept settings",
}
"""By the name of the figure."""


def captions(comparison: Comparison) -> dict[str, str]:
    """Explains each figure in a sentence or two, by the name of the figure."""
    method, point = comparison.headline or (comparison.method("plain"), comparison.single)
    score = comparison.curve_scores[0]
    title = SCORES[score].title
    ensemble = comparison.ensemble
    texts = {
        "difference": (
            f"The {title} of each method minus that of the average of all {ensemble.size} plain "
            "networks, for new trainings and new test examples. Thick: 90 % interval, which "
            "decides the verdict. Thin: 95 % interval. In the grey zone the difference is within "
            "the margin. Not worse: the thick bar ends left of the grey zone's right edge."
        ),
        "example_differences": (
            "Left: each test example's loss minus its loss by plain networks, mean over "
            "replicates, sorted. Right: the running sum over the number of examples, which ends at "
            "the mean difference. A curve that falls only at its left end shows that few examples "
            "carry the difference."
        ),
        "tuning": (
            "Mean loss of left-out training examples by the epochs of training. A marker shows the "
            "epochs that the method trains; dashed lines are of the largest average. No test "
            "example is used."
            f"{_shares_caption(comparison)}"
        ),
        "score_against_cost": (
            f"The {title} of {subject(method, point)} is "
            f"{score_text(score, point.over_seeds[score], unit=True)}. The average of "
            f"{ensemble.size} plain networks has "
            f"{score_text(score, ensemble.over_seeds[score], unit=True)}. Lower is better, "
            "further left is cheaper. A point below the blue curve has a lower mean loss on these "
            "test examples than an ensemble of the same cost. Bands and bars are 95 % intervals "
            "for new trainings. They leave out the chance of the test examples, so use the first "
            "figure to compare methods."
        ),
        "score_against_size": (
            "The blue curve meets a method's line at the method's worth: the count of averaged "
            "plain networks with the same score. The thick stretch of the line is the worth's "
            f"95 % interval. In {title} the worth of {subject(method, point)} is "
            f"{point.worth[score]}."
        ),
        "worth_chart": (
            "How many averaged plain networks each method equals, with 95 % intervals. In the "
            f"grey zone the average of all {ensemble.size} does not reach the method's score."
        ),
        "score_against_other_costs": (
            f"The {title} against seconds, parameters and bytes. A Monte-Carlo average stores the "
            "parameters of one network."
        ),
        "learning_curves": (
            "Mean over one network of each replicate; solid lines on test examples, dashed lines "
            "on training examples. The distance between the two lines is overfitting."
        ),
        "diversity": (
            "The loss of an average is its members' mean loss minus their diversity. Members are "
            "better further left and more diverse further up. Along a grey line the average has "
            "the same loss."
        ),
        "calibration": (
            "Left: predictions on the diagonal are calibrated; below it they are overconfident. "
            "Right: the error if only the most confident predictions are used."
        ),
        "features": (
            "Each tile shows the first-layer weights into one unit, or one channel of a "
            "convolution's filter, divided by the tile's largest weight. Red is positive, blue is "
            "negative."
        ),
        "sweep": (
            f"The worth of one dropout network in {title}, at each combination of the swept "
            "settings. A dotted line marks the largest average of plain networks."
        ),
    }
    if comparison.mask_curve is not None:
        needed = comparison.mask_curve.masks_needed[score]
        texts["mask_curve"] = (
            "Weight scaling needs a single prediction of the network. How many masks score as well "
            f"in {title}: {needed}. Both are of the same networks."
        )
    if comparison.exact is not None:
        texts["exact"] = _exact_caption(comparison.exact)
    if comparison.overfitting:
        texts["overfitting"] = _overfitting_caption(comparison.overfitting)
    if comparison.co_adaptation:
        texts["co_adaptation"] = _co_adaptation_caption(comparison.co_adaptation)
    return texts


def _shares_caption(comparison: Comparison) -> str:
    """Explains the dots of the cross-validation's figure."""
    if all(curve.choice_shares is None for curve in comparison.tuning):
        return ""
    return (
        " Circles show the epochs that resamples of the training examples choose: the larger the "
        "circle, the more resamples. If a line has several large circles, its choice is not sure."
    )


def _exact_caption(exact: Exact) -> str:
    error = score_text("error", exact.weight_scaling["error"], unit=True)
    return (
        f"A network of {exact.num_units} hidden units, averaged over all {exact.num_masks:,} "
        f"masks. By weight scaling its test error is {error}. Weight scaling has an NLL "
        f"{_higher_or_lower(exact.nonlinearity_gap['nll'])} than the geometric mean, since the "
        "network is not linear. The geometric mean has an NLL "
        f"{_higher_or_lower(exact.pool_gap['nll'])} than the arithmetic mean."
    )


def _higher_or_lower(difference: Interval) -> str:
    """Writes a difference of two NLLs as "lower by" or "higher by" a positive number."""
    word, shown = ("lower", negated(difference)) if difference.mean < 0 else ("higher", difference)
    return f"{word} by {interval_text(shown, max_decimals=MAX_NATS_DECIMALS)} nats"


def _overfitting_caption(results: list[Overfitting]) -> str:
    score = "error" if "error" in results[0].gap else "mse"
    by_size = sorted(results, key=lambda result: result.train_size)
    # The gap of two percentages is in points; of each method the largest size is the last.
    gaps = {
        result.networks: difference_text(score, result.gap[score], unit=True) for result in by_size
    }
    return (
        "One network trained on fewer examples for as many steps. With all training examples the "
        f"test {SCORES[score].title} minus the training {SCORES[score].title} is {gaps['plain']} "
        f"without dropout and {gaps['dropout']} with dropout."
    )


def _co_adaptation_caption(results: dict[str, CoAdaptation]) -> str:
    text = "Hidden units of networks that predict without dropout."
    if all(result.correlation for result in results.values()):
        last_layer = {
            networks: interval_text(list(result.correlation.values())[-1])
            for networks, result in results.items()
        }
        text += (
            " In the last hidden layer the mean absolute correlation of two units is "
            f"{last_layer['plain']} after training without dropout and {last_layer['dropout']} "
            "after training with dropout."
        )
    return text
