"""The tables of a comparison: in the terminal, on the page, and as CSV."""

import csv
import io
import math

from rich import box
from rich.table import Table
from rich.text import Text

from jdrop.statistics import EquivalenceTest, Interval
from jdrop.study.results import Comparison, Cost
from jdrop.study.scores import COSTS, SCORES, format_interval

PROFILE_SCORES = (
    "ece",
    "ece_equal_mass",
    "debiased_ece",
    "aurc",
    "entropy",
    "mutual_information",
    "auroc_entropy",
    "auroc_mutual_information",
    "rmse",
    "coverage",
)
"""Scores that are not means over examples."""

TERMINAL_NOTE = (
    "worth: how many plain networks must be averaged to score as well, with its 95 % interval for "
    "new trainings and new test examples; ≤1: one does, >: all are too few. enough?: as good as "
    "all of them within the margin? Cost: FLOPs of training and of a prediction, one plain network "
    "is 1."
)

Rows = list[list[str]]


def terminal(comparison: Comparison) -> Table:
    """Returns the table for a terminal of 80 columns: methods down, scores across."""
    main_score = comparison.curve_scores[0]
    wanted = ("error", "nll", "calibrated_nll", "crps", "mse")
    shown_scores = [score for score in wanted if score in comparison.curve_scores]
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=TERMINAL_NOTE,
    )
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    headers = {"calibrated_nll": "calib.\nNLL", "error": "error\n%", "nll": "\nNLL"}
    for score in shown_scores:
        header = headers.get(score, SCORES[score].title)
        table.add_column(header, justify="right", no_wrap=True)
    worth_score = "calib. NLL" if main_score == "calibrated_nll" else SCORES[main_score].title
    table.add_column(f"worth,\n{worth_score}", justify="right", no_wrap=True)
    table.add_column("\nenough?", no_wrap=True)
    if comparison.has_costs:
        table.add_column("cost\ntrain", justify="right", no_wrap=True)
        table.add_column("\nrun", justify="right", no_wrap=True)
    plain_cost = comparison.method("plain").points[0].cost
    for method, point in comparison.table:
        cells = [
            f"{point.scores[score].mean * SCORES[score].scale:.{SCORES[score].digits}f}"
            for score in shown_scores
        ]
        if method.name == "plain":
            cells += ["", ""]
        else:
            cells += [str(point.worth[main_score]), point.against_ensemble[main_score].verdict]
        if comparison.has_costs:
            cells += _cost_ratios(point.cost, plain_cost)
        # Text, not a string: a name in brackets is not markup.
        table.add_row(*(Text(cell) for cell in (method.title(point.size), *cells)))
    return table


def _cost_ratios(cost: Cost | None, plain_cost: Cost | None) -> list[str]:
    """The FLOPs of training and of a prediction, as multiples of one plain network's."""
    assert cost is not None
    assert plain_cost is not None
    training = cost.train_flops / plain_cost.train_flops
    prediction = cost.predict_flops / plain_cost.predict_flops
    return [f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" for ratio in (training, prediction)]


def score_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: the scores and the cost of each point of the table."""
    header = ["method", *(SCORES[score].title_with_unit for score in comparison.curve_scores)]
    if comparison.has_costs:
        header += ["training FLOPs", "prediction FLOPs", "parameters", "training seconds"]
    plain_cost = comparison.method("plain").points[0].cost
    rows = []
    for method, point in comparison.table:
        row = [method.title(point.size)]
        row += [
            format_interval(score, point.over_seeds[score]) for score in comparison.curve_scores
        ]
        if comparison.has_costs and point.cost is not None:
            row += _cost_ratios(point.cost, plain_cost)
            row += [f"{point.cost.parameters:,}", f"{point.cost.train_seconds:.2f}"]
        rows.append(row)
    return header, rows


def score_note(comparison: Comparison) -> str:
    """Explains the intervals of the score table, and which networks its rows average."""
    main_score = comparison.curve_scores[0]
    plain = comparison.method("plain").points[0]
    names = {method.name for method in comparison.methods}
    sentences = [
        "±: half the 95 % interval for new trainings, on these test examples.",
        "With new trainings and new test examples the interval is wider: one plain network has "
        f"{format_interval(main_score, plain.scores[main_score], unit=True)} in "
        f"{SCORES[main_score].title}.",
        "Intervals are for the mean over trainings on these training examples. Each interval "
        "stands alone: it is not widened for multiple comparisons.",
    ]
    if not all(method.retrained for method in comparison.methods):
        sentences.append(
            "A row without ± is of one given network. The intervals of its worth hold for this "
            "network, not for training it anew."
        )
    sentences.append("Scores are means over all networks of a replicate.")
    if {"dropout", "monte-carlo"} <= names and comparison.method("dropout").points[-1].size > 1:
        sentences.append(
            "Single-network rows average all dropout networks of a replicate. Masks are drawn for "
            "the first of them only."
        )
        if comparison.mask_curve is not None:
            sentences.append(
                "The mask figure compares masks and weight scaling of the same networks."
            )
    profiled = "ECE, AURC, AUROC, entropy and mutual information are"
    if comparison.task == "regression":
        profiled = "Coverage is"
    sentences.append(
        f"{profiled} of the first networks of each replicate, as many as the row says."
    )
    if comparison.has_costs:
        sentences.append("FLOPs are multiples of one plain network's.")
    return " ".join(sentences)


def worth_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: the worth of each method, and the verdict in the main score."""
    main_score = comparison.curve_scores[0]
    header = ["method", *(SCORES[score].title for score in comparison.curve_scores)]
    header.append(f"{SCORES[main_score].title} minus that of all: enough?")
    rows = []
    for method, point in comparison.table:
        if method.name == "plain":
            continue
        worths = [str(point.worth[score]) for score in comparison.curve_scores]
        verdict = _verdict(point.against_ensemble[main_score])
        rows.append([method.title(point.size), *worths, verdict])
    return header, rows


def _verdict(test: EquivalenceTest) -> str:
    low, high = test.difference.low, test.difference.high
    return f"{test.difference.mean:+.3f} [{low:+.3f}, {high:+.3f}]: {test.verdict}"


def profile_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: calibration, selective prediction, detection."""
    scores = [
        score
        for score in PROFILE_SCORES
        if any(score in point.scores for _, point in comparison.table)
    ]
    rows = []
    for method, point in comparison.table:
        cells = [
            format_interval(score, point.scores[score]) if score in point.scores else "n/a"
            for score in scores
        ]
        rows.append([method.title(point.size), *cells])
    return ["method", *(SCORES[score].title_with_unit for score in scores)], rows


def diversity_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: how much the members of averages differ."""
    results = comparison.diversity
    if not results:
        return [], []
    ambiguities = list(results[0].ambiguity)
    measures = [
        ("disagreement", "disagreement, %", 100, 2),
        ("pairwise_kl", "pairwise KL, nats", 1, 4),
        ("q_statistic", "Q", 1, 3),
        ("mutual_information", "MI, nats", 1, 4),
    ]
    measures = [measure for measure in measures if getattr(results[0], measure[0]) is not None]
    header = ["members", *(title for _, title, _, _ in measures)]
    header += [f"{name}: members - diversity = pool" for name in ambiguities]
    rows = []
    for result in results:
        row = [comparison.method(result.method).title(str(result.size))]
        row += [
            plain_interval(getattr(result, name), digits, scale)
            for name, _, scale, digits in measures
        ]
        for name in ambiguities:
            terms = result.ambiguity[name]
            row.append(
                f"{terms.members.mean:.4f} - {terms.diversity.mean:.4f} = {terms.pool.mean:.4f}"
            )
        rows.append(row)
    return header, rows


def plain_interval(interval: Interval, digits: int, scale: int = 1) -> str:
    """Formats the mean of an interval and, where it has ends, half of its width."""
    text = f"{interval.mean * scale:.{digits}f}"
    if interval.low is None or interval.high is None or math.isnan(interval.mean):
        return text
    return f"{text}±{(interval.high - interval.low) / 2 * scale:.{digits}f}"


def scores_csv(comparison: Comparison) -> str:
    """Returns a CSV with a line for each score of each method at each size."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            *("method", "size", "unit", "score", "mean", "low", "high"),
            *("worth", "worth_low", "worth_high", "verdict", "p_value"),
            *COSTS,
        ]
    )
    for method in comparison.methods:
        for point in method.points:
            for score, interval in point.scores.items():
                worth, test = point.worth.get(score), point.against_ensemble.get(score)
                writer.writerow(
                    [method.name, point.size, method.unit, score]
                    + [interval.mean, interval.low, interval.high]
                    + ([worth.value, worth.low, worth.high] if worth else [""] * 3)
                    + ([test.verdict, test.p_value] if test else [""] * 2)
                    + ["" if point.cost is None else getattr(point.cost, name) for name in COSTS]
                )
    return buffer.getvalue()
