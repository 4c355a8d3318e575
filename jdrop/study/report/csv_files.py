"""The scores, and the sweep, as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence

from jdrop.statistics import EnsembleEquivalent, Interval
from jdrop.study.report.numbers import clipped
from jdrop.study.results import Comparison, MethodResult
from jdrop.study.scores import COSTS

OWN_EPOCHS, SAME_EPOCHS = "own epochs", "same epochs"
"""The two views: each method at the epochs that cross-validation chose, or all equally long."""


def scores_csv(comparison: Comparison) -> str:
    """Returns a CSV with a line for each score of each method at each size.

    A tuned comparison has all lines twice, by the column `view`: first at each method's own epochs.
    The p-value is the one-sided p-value of the hypothesis that the verdict rejects, and for
    "equivalent" the larger of two.
    """
    header = ["view", "method", "size", "unit", "epochs", "weight_decay"]
    header += ["score", *_ends("mean", ""), "unreliable"]
    for reference in ("single", "ensemble", "headline"):
        header += _ends(f"minus_{reference}", f"minus_{reference}_")
    header += [*_ends("worth", "worth_"), "verdict", "p_value", *COSTS, "search_flops"]
    views = {OWN_EPOCHS: comparison.methods, SAME_EPOCHS: comparison.same_epochs or []}
    if comparison.same_epochs is None:
        views = {SAME_EPOCHS: comparison.methods}
    lines = (line for view, methods in views.items() for line in _score_lines(view, methods))
    return _csv(header, lines)


def _ends(mean: str, prefix: str) -> list[str]:
    return [mean, f"{prefix}low", f"{prefix}high"]


def _score_lines(view: str, methods: Iterable[MethodResult]) -> Iterable[list[object]]:
    for method in methods:
        for point in method.points:
            for score, interval in point.scores.items():
                shown = clipped(score, interval)
                test = point.against_ensemble.get(score)
                line: list[object] = [view, method.name, point.size, method.unit]
                line += [point.epochs, point.weight_decay, score]
                line += [shown.mean, shown.low, shown.high, score in point.unreliable]
                for differences in (point.minus_single, point.minus_ensemble, point.minus_headline):
                    line += _interval_cells(differences.get(score))
                line += _worth_cells(point.worth.get(score))
                line += [None, None] if test is None else [test.verdict, test.p_value]
                for name in (*COSTS, "search_flops"):
                    line.append(None if point.cost is None else getattr(point.cost, name))
                yield line


def sweep_csv(comparison: Comparison) -> str:
    """Returns a CSV with a line for each score of each kind of networks in each swept cell.

    `networks` is "plain" (one network), "ensemble" (all plain ones) or "dropout" (one network,
    which has a worth).
    """
    names = list(comparison.sweep[0].at)
    header = [*names, "networks", "score", *_ends("mean", ""), *_ends("worth", "worth_")]
    lines = []
    for cell in comparison.sweep:
        for networks, scores in cell.scores.items():
            for score, interval in scores.items():
                line: list[object] = [cell.at[name] for name in names]
                line += [networks, score, *_interval_cells(clipped(score, interval))]
                worth = cell.worth.get(score) if networks == "dropout" else None
                lines.append([*line, *_worth_cells(worth)])
    return _csv(header, lines)


def _interval_cells(interval: Interval | None) -> list[object]:
    return [None] * 3 if interval is None else [interval.mean, interval.low, interval.high]


def _worth_cells(worth: EnsembleEquivalent | None) -> list[object]:
    return [None] * 3 if worth is None else [worth.value, worth.low, worth.high]


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return buffer.getvalue()
