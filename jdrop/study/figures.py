"""The figures of a comparison. Each function draws one and returns it; nothing is saved here."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jdrop.study.results import Comparison, Row

# Colours that remain distinct for colour-blind readers (Okabe and Ito).
PLAIN, DROPOUT, MONTE_CARLO = "#0072B2", "#D55E00", "#009E73"
TITLES = {"error": "test error", "nll": "test NLL (nats)"}


def score_against_ensemble_size(comparison: Comparison) -> Figure:
    """NLL and error against the number of averaged networks, dropout as lines across.

    Bands are 95 % intervals, drawn where at least three disjoint groups stand behind them: two
    give intervals so wide that nothing else could be seen.
    """
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), ("nll", "error"), strict=True):
        _ensemble_curve(axes, comparison, "plain", score, PLAIN, "average of plain networks")
        _ensemble_curve(
            axes, comparison, "dropout", score, DROPOUT, "average of dropout networks", thin=True
        )
        _line(
            axes,
            comparison.row("dropout", 1),
            score,
            DROPOUT,
            "one dropout network, weight scaling",
        )
        _line(
            axes,
            comparison.row("dropout", 1, "Monte-Carlo"),
            score,
            MONTE_CARLO,
            f"one dropout network, {comparison.settings['samples']} masks averaged",
            dashed=True,
        )
        axes.set_xlabel("networks averaged")
        axes.set_ylabel(TITLES[score])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(0.5, comparison.settings["members"] + 0.5)
        _finish(axes, percent=score == "error")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def learning_curves(comparison: Comparison) -> Figure:
    """Error on training and test examples while the networks trained, one panel for each kind."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = {"plain": PLAIN, "dropout": DROPOUT}
    for axes, (networks, curve) in zip(panels, comparison.curves.items(), strict=True):
        colour = colours[networks]
        axes.plot(curve.epochs, curve.test_error, color=colour, label="test")
        axes.plot(curve.epochs, curve.train_error, color=colour, ls="--", label="training")
        axes.fill_between(
            curve.epochs, curve.train_error, curve.test_error, color=colour, alpha=0.12, lw=0
        )
        axes.set_title(f"{networks} networks", loc="left")
        axes.set_xlabel("epochs")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        _finish(axes, percent=True)
    # The first epochs are far above the rest and would press the end of the curves together.
    ends = [curve.test_error[len(curve.epochs) // 4] for curve in comparison.curves.values()]
    panels[0].set_ylim(0, 2.5 * max(*ends, 0.01))
    panels[0].set_ylabel("error, mean of the networks")
    return figure


def _ensemble_curve(
    axes: Axes,
    comparison: Comparison,
    networks: str,
    score: str,
    colour: str,
    label: str,
    *,
    thin: bool = False,
) -> None:
    sizes = range(1, comparison.settings["members"] + 1)
    intervals = [comparison.row(networks, size).test[score] for size in sizes]
    axes.plot(
        sizes,
        [interval.mean for interval in intervals],
        color=colour,
        marker="o",
        ms=2 if thin else 4,
        lw=0.8 if thin else 1.6,
        alpha=0.6 if thin else 1,
        label=label,
        zorder=2 if thin else 4,
    )
    banded = [
        (size, interval.low, interval.high)
        for size, interval in zip(sizes, intervals, strict=True)
        if interval.num_replicates >= 3 and interval.low is not None
    ]
    if banded and not thin:
        banded_sizes, low, high = zip(*banded, strict=True)
        axes.fill_between(banded_sizes, low, high, color=colour, alpha=0.15, lw=0)


def _line(
    axes: Axes, row: Row, score: str, colour: str, label: str, *, dashed: bool = False
) -> None:
    interval = row.test[score]
    style = (0, (4, 2)) if dashed else "-"
    axes.axhline(interval.mean, color=colour, lw=1.6, ls=style, label=label, zorder=3)
    if interval.low is not None and interval.high is not None and not dashed:
        axes.axhspan(interval.low, interval.high, color=colour, alpha=0.12, lw=0)


def _finish(axes: Axes, *, percent: bool) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
