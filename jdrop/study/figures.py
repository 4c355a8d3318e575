"""The figures of a comparison. Each function draws one and returns it, or None without its part."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

from jdrop.statistics import EnsembleEquivalent, Interval
from jdrop.study.results import COSTS, SCORES, CoAdaptation, Comparison, Method, Point

# Colours that remain distinct for colour-blind readers (Okabe and Ito), and markers that remain
# distinct in grey.
STYLES = {
    "plain": ("#0072B2", "o"),
    "dropout": ("#D55E00", "s"),
    "monte-carlo": ("#009E73", "^"),
    "dropout-thinned": ("#000000", "p"),
    "small": ("#56B4E9", "v"),
    "wide": ("#0072B2", "D"),
    "long": ("#D55E00", "P"),
    "early-stopping": ("#8C8C8C", "<"),
    "weight-decay": ("#8C8C8C", ">"),
    "fixed-masks": ("#CC79A7", "X"),
    "masksembles": ("#E69F00", "*"),
}
OTHER = ("#444444", "h")

CURVES = ("plain", "dropout", "monte-carlo")
"""Methods that are drawn at all their sizes; of the others, the largest is a point."""


def _style(name: str) -> tuple[str, str]:
    return STYLES.get(name, OTHER)


def _scaled(score: str, interval: Interval) -> tuple[float, float, float]:
    """Mean, low and high, as shown."""
    mean, low, high = (end * SCORES[score].scale for end in _ends(interval))
    return mean, low, high


def _ends(interval: Interval) -> tuple[float, float, float]:
    """Mean, low and high, of one value the mean only."""
    low = interval.mean if interval.low is None else interval.low
    high = interval.mean if interval.high is None else interval.high
    return interval.mean, low, high


def _label(score: str) -> str:
    how = SCORES[score]
    return f"{how.title} ({how.unit})" if how.unit else how.title


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)


def _log_ticks(axes: Axes) -> None:
    """Whole numbers on a logarithmic axis that spans less than two decades."""
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def costs_known(comparison: Comparison) -> bool:
    """Whether it is known of every prediction what it cost."""
    points = (point for method in comparison.methods for point in method.points)
    return all(point.cost is not None for point in points)


def _panels(comparison: Comparison) -> tuple[str, ...]:
    """The two scores of the main figure."""
    first = comparison.curve_scores[0]
    second = "error" if "error" in comparison.curve_scores else comparison.curve_scores[1]
    return first, second


def score_against_cost(comparison: Comparison) -> Figure | None:
    """Score against the FLOPs of training and of a prediction: ensembles as curves."""
    if not costs_known(comparison):
        return None
    scores, costs = _panels(comparison), ("train_flops", "predict_flops")
    figure = Figure(figsize=(10, 8.2), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row", sharex="col")
    for axes_of_score, score in zip(grid, scores, strict=True):
        for axes, cost in zip(axes_of_score, costs, strict=True):
            _cost_panel(axes, comparison, score, cost)
        axes_of_score[0].set_ylabel(f"test {_label(score)}")
    for axes, cost in zip(grid[-1], costs, strict=True):
        axes.set_xlabel(COSTS[cost])
    _legend_above(figure, grid[0][0])
    return figure


def score_against_other_costs(comparison: Comparison) -> Figure | None:
    """The headline's score against everything else that a prediction can cost."""
    if not costs_known(comparison):
        return None
    costs = [cost for cost in COSTS if cost not in ("train_flops", "predict_flops")]
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    grid = figure.subplots(2, 2, sharey=True)
    score = comparison.curve_scores[0]
    for axes, cost in zip(grid.flat, costs, strict=True):
        _cost_panel(axes, comparison, score, cost)
        axes.set_xlabel(COSTS[cost])
    for axes in grid[:, 0]:
        axes.set_ylabel(f"test {_label(score)}")
    _legend_above(figure, grid[0, 0])
    return figure


def _legend_above(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, of what is in `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)


def _cost_panel(axes: Axes, comparison: Comparison, score: str, cost: str) -> None:
    for method in comparison.methods:
        colour, marker = _style(method.name)
        points = method.points if method.name in CURVES else method.points[-1:]
        x = np.array([getattr(point.cost, cost) for point in points])
        mean, low, high = np.array([_scaled(score, point.over_seeds[score]) for point in points]).T
        name = method.title(points[-1].size)
        if len(points) > 1 and len({*x}) > 1:
            counted = f"1 to {points[-1].size}"
            name = method.label.format(n=counted)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(x, mean, color=colour, marker=marker, ms=4, lw=1.5, label=name)
            continue
        if len(points) > 1:  # Masks cost nothing to train: only all of them are shown.
            x, mean, low, high = (values[-1:] for values in (x, mean, low, high))
        axes.errorbar(
            x,
            mean,
            np.stack([mean - low, high - mean]),
            color=colour,
            marker=marker,
            ms=7,
            lw=1,
            ls="",
            label=name,
        )
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    _finish(axes)


def score_against_size(comparison: Comparison) -> Figure | None:
    """What an equivalent is: where the curve of plain ensembles meets one dropout network."""
    plain = comparison.method("plain")
    others = [m for m in comparison.methods if m.name in ("dropout", "monte-carlo")]
    scores = comparison.curve_scores
    figure = Figure(figsize=(10, 3.3 * -(-len(scores) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(scores) // 2), 2, squeeze=False)
    for axes, score in zip(grid.flat, scores, strict=False):
        sizes = [point.size for point in plain.points]
        mean, low, high = np.array(
            [_scaled(score, point.over_seeds[score]) for point in plain.points]
        ).T
        colour, marker = _style("plain")
        axes.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
        axes.plot(sizes, mean, color=colour, marker=marker, ms=4, label="average of plain networks")
        for method in others:
            point = method.points[-1] if method.unit == "masks" else method.points[0]
            colour, marker = _style(method.name)
            mean_of, _, _ = _scaled(score, point.over_seeds[score])
            style = "--" if method.unit == "masks" else "-"
            worth = point.worth[score]
            label = f"{method.title(point.size)}: {worth}"
            axes.axhline(mean_of, color=colour, ls=style, lw=1.5, label=label)
            ends = [min(end, sizes[-1] + 0.4) for end in (worth.low, worth.high)]
            axes.plot(ends, [mean_of] * 2, color=colour, lw=6, alpha=0.35, solid_capstyle="butt")
            if math.isfinite(worth.value):
                axes.plot([worth.value], [mean_of], color=colour, marker=marker, ms=8)
        axes.set_xlim(0.6, sizes[-1] + 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("networks averaged")
        axes.set_ylabel(f"test {_label(score)}")
        axes.legend(frameon=False, fontsize=9)
        _finish(axes)
    for axes in grid.flat[len(scores) :]:
        axes.set_visible(False)
    return figure


def worth_chart(comparison: Comparison) -> Figure | None:
    """Every method's equivalent in every score, with intervals."""
    rows = [(method, point) for method, point in comparison.table if method.name != "plain"]
    if not rows:
        return None
    scores = comparison.curve_scores
    figure = Figure(figsize=(10, 0.9 + 0.36 * len(rows)), layout="constrained")
    largest = comparison.ensemble.size
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axes, score in zip(panels, scores, strict=True):
        for row, (method, point) in enumerate(rows):
            _worth_bar(axes, row, point.worth[score], _style(method.name))
        axes.set_xscale("log")
        axes.set_xlim(0.85, largest * 1.6)
        axes.axvspan(largest, largest * 1.6, color="#888888", alpha=0.12, lw=0)
        ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 50, 100) if tick <= largest]
        axes.set_xticks(ticks)
        _log_ticks(axes)
        axes.set_title(SCORES[score].title, loc="left", fontsize=10)
        axes.set_xlabel("plain networks")
        _finish(axes)
    panels[0].set_yticks(range(len(rows)), [method.title(point.size) for method, point in rows])
    panels[0].invert_yaxis()
    return figure


def _worth_bar(axes: Axes, row: int, worth: EnsembleEquivalent, style: tuple[str, str]) -> None:
    colour, marker = style
    beyond = worth.largest * 1.3
    low, value, high = (min(end, beyond) for end in (worth.low, worth.value, worth.high))
    axes.plot([low, high], [row, row], color=colour, lw=2, solid_capstyle="butt")
    axes.plot([value], [row], color=colour, marker=marker, ms=7)
    if worth.high == math.inf:
        axes.plot([beyond], [row], color=colour, marker=">", ms=5)


def mask_curve(comparison: Comparison) -> Figure | None:
    """The score of a Monte-Carlo average against its number of masks."""
    curve = comparison.mask_curve
    if curve is None:
        return None
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    scores = _panels(comparison)
    for axes, score in zip(figure.subplots(1, 2), scores, strict=True):
        scale = SCORES[score].scale
        values = np.array(curve.scores[score]) * scale
        colour, marker = _style("monte-carlo")
        axes.plot(curve.num_masks, values, color=colour, marker=marker, label="average of masks")
        axes.axhline(
            curve.weight_scaling[score] * scale,
            color=_style("dropout")[0],
            label=f"weight scaling; masks needed: {curve.masks_needed[score]}",
        )
        axes.set_xscale("log")
        axes.set_xticks([t for t in (1, 2, 5, 10, 20, 50, 100, 1000) if t <= curve.num_masks[-1]])
        axes.set_xlabel("masks averaged")
        axes.set_ylabel(f"test {_label(score)}")
        axes.legend(frameon=False, fontsize=9)
        _log_ticks(axes)
        _finish(axes)
    return figure


def exact(comparison: Comparison) -> Figure | None:
    """Weight scaling, and the two averages over every mask of a small network."""
    found = comparison.exact
    if found is None:
        return None
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    readings = ("weight scaling", "geometric", "arithmetic")
    for axes, score in zip(figure.subplots(1, 3), ("nll", "brier", "error"), strict=True):
        for row, name in enumerate(readings):
            interval = getattr(found, name.replace(" ", "_"))[score]
            mean, low, high = _scaled(score, interval)
            axes.errorbar(
                [mean], [row], xerr=[[mean - low], [high - mean]], color="#333333", marker="o"
            )
        axes.set_yticks(range(3), readings if score == "nll" else ["", "", ""])
        axes.set_ylim(2.5, -0.5)
        axes.set_xlabel(f"test {_label(score)}")
        _finish(axes)
    return figure


def overfitting(comparison: Comparison) -> Figure | None:
    """Training and test scores against the number of training examples, plain beside dropout."""
    found = comparison.overfitting
    if len({one.train_size for one in found}) < 2:
        return None
    scores = [score for score in ("nll", "error", "mse") if score in found[0].test][:2]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        for kind in ("plain", "dropout"):
            of_kind = [one for one in found if one.networks == kind]
            of_kind.sort(key=lambda one: one.train_size)
            sizes = [one.train_size for one in of_kind]
            colour, marker = _style(kind)
            for part, style in (("test", "-"), ("train", "--")):
                mean, low, high = np.array(
                    [_scaled(score, getattr(one, part)[score]) for one in of_kind]
                ).T
                axes.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
                axes.plot(
                    sizes,
                    mean,
                    color=colour,
                    marker=marker,
                    ls=style,
                    label=f"{kind}, {'test' if part == 'test' else 'training'}",
                )
        axes.set_xscale("log")
        axes.set_xticks(sizes)
        _log_ticks(axes)
        axes.set_xlabel("training examples")
        axes.set_ylabel(_label(score))
        axes.legend(frameon=False, fontsize=9)
        _finish(axes)
    return figure


def learning_curves(comparison: Comparison) -> Figure | None:
    """Scores on training and test examples while the networks trained."""
    curves = comparison.learning_curves
    if not curves:
        return None
    scores = list(next(iter(curves.values())).test)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        scale = SCORES[score].scale
        for kind, curve in curves.items():
            colour, _ = _style(kind)
            for part, style in ((curve.test, "-"), (curve.train, "--")):
                name = "test" if part is curve.test else "training"
                values = np.array(part[score]) * scale
                axes.plot(curve.epochs, values, color=colour, ls=style, label=f"{kind}, {name}")
        # The first epochs are far above the rest and would press the end of the curves together.
        ends = [np.array(c.test[score])[len(c.epochs) // 4 :].max() for c in curves.values()]
        axes.set_ylim(0, 1.6 * max(*ends, 1e-9) * scale)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epochs")
        axes.set_ylabel(_label(score))
        axes.legend(frameon=False, fontsize=9)
        _finish(axes)
    return figure


def diversity(comparison: Comparison) -> Figure | None:
    """How good members are and what averaging them gains: masks and seeds on one scale."""
    found = comparison.diversity
    if not found:
        return None
    kinds = list(found[0].ambiguity)
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    names = {method.name: method for method in comparison.methods}
    for axes, kind in zip(panels, kinds, strict=True):
        for one in found:
            parts = one.ambiguity[kind]
            colour, marker = _style(one.method)
            low, high = (
                (parts.diversity.mean - end if end is not None else 0)
                for end in (parts.diversity.low, parts.diversity.high)
            )
            axes.errorbar(
                [parts.members.mean],
                [parts.diversity.mean],
                yerr=[[max(low, 0)], [max(-high, 0)]],
                color=colour,
                marker=marker,
                ms=8,
                ls="",
                label=names[one.method].label.format(n=one.size),
            )
        _pool_lines(axes)
        axes.set_title(kind, loc="left", fontsize=10)
        axes.set_xlabel("mean loss of the members")
        _finish(axes)
    panels[0].set_ylabel("gained by averaging")
    _legend_above(figure, panels[0])
    return figure


def _pool_lines(axes: Axes) -> None:
    """Lines on which the average has the same loss."""
    axes.margins(0.15)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    bottom = min(bottom, 0)
    for pool in np.linspace(left - top, right - bottom, 9)[1:-1]:
        axes.plot([left, right], [left - pool, right - pool], color="#999999", lw=0.5, zorder=0)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _main_points(comparison: Comparison) -> list[tuple[Method, Point]]:
    """At most five points of the table that were profiled."""
    wanted = ("plain", "dropout", "monte-carlo")
    table = [(method, point) for method, point in comparison.table if point.reliability is not None]
    main = [
        (method, point)
        for method, point in table
        if method.name in wanted and point.size in (1, method.points[-1].size)
    ]
    return (main or table)[:5]


def calibration(comparison: Comparison) -> Figure | None:
    """Reliability, and the error of the most confident predictions."""
    points = _main_points(comparison)
    if not points:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="#999999", lw=0.8)
    for method, point in points:
        colour, marker = _style(method.name)
        style = "-" if point.size > 1 else "--"
        reliability, risk = point.reliability, point.risk_coverage
        assert reliability is not None
        assert risk is not None
        left.plot(
            reliability.confidence,
            reliability.accuracy,
            color=colour,
            marker=marker,
            ms=5,
            ls=style,
            label=method.title(point.size),
        )
        right.plot(risk.coverage, np.array(risk.risk) * 100, color=colour, ls=style)
    left.set_xlabel("probability of the top class")
    left.set_ylabel("how often it was right")
    right.set_xlabel("share of the examples, the most confident first")
    right.set_ylabel("their error (%)")
    right.xaxis.set_major_formatter(PercentFormatter(1))
    for axes in (left, right):
        _finish(axes)
    left.legend(frameon=False, fontsize=9)
    return figure


def co_adaptation(comparison: Comparison) -> Figure | None:
    """Hidden units: their correlation, their sparsity, and what deleting them does."""
    found = comparison.co_adaptation
    if not found or not next(iter(found.values())).correlation:
        return None
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.subplots(2, 2)
    _layer_bars(grid[0, 0], found, "correlation", "mean |correlation| of units")
    _layer_bars(grid[0, 1], found, "zero_share", "share of activations that are 0")
    score = next(iter(next(iter(found.values())).deletion))
    for kind, one in found.items():
        colour, marker = _style(kind)
        values = np.array(one.deletion[score]) * SCORES[score].scale
        deleted = np.array(one.deleted) * 100
        grid[1, 0].plot(deleted, values, color=colour, marker=marker, label=kind)
        layer = list(one.activation_counts)[-1]
        counts = one.activation_counts[layer]
        ends = np.linspace(one.activation_min[layer], one.activation_max[layer], len(counts) + 1)
        middles = (ends[1:] + ends[:-1]) / 2
        grid[1, 1].plot(middles, counts, color=colour, label=kind)
    grid[1, 0].set_xlabel("hidden units deleted (%)")
    grid[1, 0].set_ylabel(f"test {_label(score)}")
    grid[1, 1].set_yscale("log")
    grid[1, 1].set_xlabel("activation, last hidden layer")
    grid[1, 1].set_ylabel("share")
    for axes in grid.flat:
        axes.legend(frameon=False, fontsize=9)
        _finish(axes)
    return figure


def _layer_bars(axes: Axes, found: dict[str, CoAdaptation], name: str, label: str) -> None:
    for place, (kind, one) in enumerate(found.items()):
        values = getattr(one, name)
        mean, low, high = np.array([_ends(interval) for interval in values.values()]).T
        x = np.arange(len(values)) + 0.4 * place - 0.2
        errors = np.stack([mean - low, high - mean])
        axes.bar(x, mean, 0.36, yerr=errors, color=_style(kind)[0], label=kind, alpha=0.85)
    names = next(iter(found.values())).correlation
    axes.set_xticks(range(len(names)), [f"layer {i + 1}" for i in range(len(names))])
    axes.set_ylabel(label)


def features(comparison: Comparison) -> Figure | None:
    """First-layer weights as images, where inputs are square ones."""
    found = {
        kind: np.array(one.features)
        for kind, one in comparison.co_adaptation.items()
        if one.features is not None
    }
    sides = {math.isqrt(weights.shape[1]) for weights in found.values()}
    if not found or any(
        weights.shape[1] not in {s * s for s in sides} for weights in found.values()
    ):
        return None
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (kind, weights) in zip(panels, found.items(), strict=True):
        axes.imshow(_tiles(weights[:64]), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"{kind}: weights into {min(64, len(weights))} units", loc="left")
        axes.set_axis_off()
    return figure


def _tiles(weights: np.ndarray) -> np.ndarray:
    """Images in a grid, each scaled to its largest weight."""
    side = math.isqrt(weights.shape[1])
    columns = math.ceil(math.sqrt(len(weights)))
    rows = -(-len(weights) // columns)
    canvas = np.full((rows * (side + 1), columns * (side + 1)), np.nan)
    for index, weight in enumerate(weights):
        row, column = divmod(index, columns)
        top, left = row * (side + 1), column * (side + 1)
        size = np.abs(weight).max() or 1
        canvas[top : top + side, left : left + side] = weight.reshape(side, side) / size
    return canvas


def sweep(comparison: Comparison) -> Figure | None:
    """The verdict over the grid of a sweep, in the headline's score."""
    cells = comparison.sweep
    if not cells:
        return None
    score = comparison.curve_scores[0]
    names = list(cells[0].at)
    values = [sorted({cell.at[name] for cell in cells}) for name in names]
    if len(names) == 1:
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        x = [cell.at[names[0]] for cell in cells]
        for kind, style in (("plain", "plain"), ("ensemble", "small"), ("dropout", "dropout")):
            mean, low, high = np.array(
                [_scaled(score, cell.scores[kind][score]) for cell in cells]
            ).T
            colour, marker = _style(style)
            name = f"average of {cells[0].worth[score].largest}" if kind == "ensemble" else kind
            right.errorbar(
                x,
                mean,
                np.stack([mean - low, high - mean]),
                color=colour,
                marker=marker,
                label=name,
            )
        for place, cell in zip(x, cells, strict=True):
            _upright(left, place, cell.worth[score])
        left.set_yscale("log")
        left.set_ylabel(f"networks one dropout network is worth in {SCORES[score].title}")
        right.set_ylabel(f"test {_label(score)}")
        right.legend(frameon=False, fontsize=9)
        for axes in (left, right):
            axes.set_xlabel(names[0].replace("_", " "))
            _finish(axes)
        left.yaxis.set_major_formatter(ScalarFormatter())
        left.yaxis.set_minor_formatter(NullFormatter())
        return figure
    rest = sorted({tuple(cell.at[name] for name in names[2:]) for cell in cells})
    figure = Figure(figsize=(10, 0.9 + 3.2 * -(-len(rest) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(rest) // 2), min(2, len(rest)), squeeze=False)
    largest = cells[0].worth[score].largest
    for axes, others in zip(grid.flat, rest, strict=False):
        table = np.full((len(values[0]), len(values[1])), np.nan)
        for cell in cells:
            if tuple(cell.at[name] for name in names[2:]) != others:
                continue
            row, column = values[0].index(cell.at[names[0]]), values[1].index(cell.at[names[1]])
            worth = cell.worth[score]
            table[row, column] = math.log(min(worth.value, largest * 1.3))
            axes.text(
                column, row, str(worth).replace(" [", "\n["), ha="center", va="center", size=9
            )
        axes.imshow(table, cmap="YlGnBu", vmin=0, vmax=1.8 * math.log(largest), aspect="auto")
        axes.set_yticks(range(len(values[0])), [f"{v:g}" for v in values[0]])
        axes.set_xticks(range(len(values[1])), [f"{v:g}" for v in values[1]])
        axes.set_ylabel(names[0].replace("_", " "))
        axes.set_xlabel(names[1].replace("_", " "))
        title = ", ".join(
            f"{n.replace('_', ' ')} {v:g}" for n, v in zip(names[2:], others, strict=True)
        )
        axes.set_title(title, loc="left", fontsize=10)
    return figure


def _upright(axes: Axes, place: float, worth: EnsembleEquivalent) -> None:
    beyond = worth.largest * 1.2
    low, value, high = (min(end, beyond) for end in (worth.low, worth.value, worth.high))
    colour, marker = _style("dropout")
    axes.plot([place] * 2, [low, high], color=colour, lw=2)
    axes.plot([place], [value], color=colour, marker=marker, ms=7)
    if worth.high == math.inf:
        axes.plot([place], [beyond], color=colour, marker="^", ms=5)
    axes.axhline(worth.largest, color="#999999", lw=0.8, ls=":")


FIGURES = {
    "Score against cost": score_against_cost,
    "What the number means": score_against_size,
    "What each method is worth": worth_chart,
    "Score against other costs": score_against_other_costs,
    "How many masks": mask_curve,
    "All masks of a small network": exact,
    "Overfitting": overfitting,
    "Learning curves": learning_curves,
    "Why averages are better": diversity,
    "Calibration and selection": calibration,
    "Co-adaptation": co_adaptation,
    "First-layer features": features,
    "Where the verdict turns": sweep,
}
"""All figures, by their titles."""
