"""The table in the terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from jdrop.study.report.numbers import MARK, MINUS, margin_text, mean_text, significant
from jdrop.study.report.sentence import second_score, train_ratio
from jdrop.study.results import Comparison, MethodResult, Point
from jdrop.study.scores import SCORES

COST_NOTE = (
    " Cost in FLOPs, one plain network is 1. fit: training, with the search for epochs and weight "
    "decay. run: a prediction."
)


def terminal(comparison: Comparison) -> Table:
    """Returns the table for a terminal of 80 columns: methods down, scores across."""
    main_score = comparison.curve_scores[0]
    shown_scores = [second_score(comparison), main_score]
    largest = comparison.ensemble.size
    short = "NLL" if main_score == "nll" else "calib. NLL"
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
        caption=_note(comparison, short),
    )
    table.caption_justify = "left"
    table.add_column("", min_width=11, overflow="fold")
    headers = {"error": "error\n%", "nll": "\nNLL", "calibrated_nll": "calib.\nNLL", "mse": "\nMSE"}
    for score in shown_scores:
        table.add_column(headers[score], justify="right", no_wrap=True)
    table.add_column("vs\none", justify="right", no_wrap=True)
    table.add_column(f"vs\n{largest}", justify="right", no_wrap=True)
    table.add_column("\nworth", justify="right", no_wrap=True)
    table.add_column("\nenough?", no_wrap=True)
    if comparison.has_costs:
        table.add_column("cost\nfit", justify="right", no_wrap=True)
        table.add_column("\nrun", justify="right", no_wrap=True)
    for method, point in comparison.table:
        cells = [_score(score, point) for score in shown_scores]
        cells += _against_plain(method, point, main_score)
        if comparison.has_costs:
            cells += cost_ratios(point, comparison)
        # Text, not a string: a name in brackets is not markup.
        table.add_row(*(Text(cell) for cell in (method.title(point.size), *cells)))
    return table


def _note(comparison: Comparison, score: str) -> str:
    main_score = comparison.curve_scores[0]
    unit = SCORES[main_score].unit
    largest = comparison.ensemble.size
    text = (
        f"vs one, vs {largest}: {score} minus that of one plain network, and of the average of "
        f"{largest}, in {unit}; the report has the intervals. worth: how many plain networks must "
        f"be averaged to score as well in {score}, with its 95 % interval; ≤1: one does, >: all "
        f"are too few. enough?: as good as the average of all {largest} within the margin of "
        f"{margin_text(main_score, comparison.margins[main_score])}? Not resolved, undecided and "
        "refused: the data do not tell."
    )
    if any(method.name == "weight-scaling" for method in comparison.methods):
        text += " same, no masks: the networks of the row above, by weight scaling."
    return text + (COST_NOTE if comparison.has_costs else "")


def _score(score: str, point: Point) -> str:
    mark = MARK if score in point.unreliable else ""
    return mean_text(score, point.scores[score]) + mark


def _against_plain(method: MethodResult, point: Point, score: str) -> list[str]:
    """The differences to plain networks, the worth and the verdict; empty where they are known."""
    is_plain = method.name == "plain"
    is_single = is_plain and point is method.points[0]
    is_largest = is_plain and point is method.points[-1]
    worth = "n/a" if score in point.unreliable else str(point.worth[score])
    return [
        "" if is_single else _signed(point.minus_single[score].mean),
        "" if is_largest else _signed(point.minus_ensemble[score].mean),
        "" if is_plain else worth,
        "" if is_largest else point.against_ensemble[score].verdict,
    ]


def _signed(nats: float) -> str:
    """A difference in nats; all have as many decimals, since the terminal has no room for more."""
    if abs(nats) >= 100:  # No room for decimals either.
        return ("+" if nats > 0 else "") + significant(nats)
    text = f"{nats:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", MINUS)


def cost_ratios(point: Point, comparison: Comparison) -> list[str]:
    """The FLOPs of training and of a prediction, as multiples of one plain network's."""
    cost, plain_cost = point.cost, comparison.single.cost
    if cost is None or plain_cost is None:
        return ["", ""]
    ratios = train_ratio(point, comparison), cost.predict_flops / plain_cost.predict_flops
    return [f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" for ratio in ratios]
