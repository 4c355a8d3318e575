"""Says what a comparison found: the sentence, a table, the report and its files."""

import csv
import io
import math
import re
from importlib import resources
from pathlib import Path

import jinja2
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from jdrop.statistics import EnsembleEquivalent, EquivalenceTest, Interval
from jdrop.study.figures import FIGURES, costs_known
from jdrop.study.results import (
    COSTS,
    SCORES,
    Comparison,
    Cost,
    Method,
    Point,
    format_interval,
    write_text,
)

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
"""Scores of the second table: those that are no means over examples."""


def headline(comparison: Comparison) -> tuple[Method, Point]:
    """What the sentence is about: one dropout network, else the first thing that is not plain."""
    for method in comparison.methods:
        if method.name == "dropout":
            return method, method.points[0]
    method = next(method for method in comparison.methods if method.name != "plain")
    return method, method.points[-1]


def sentence(comparison: Comparison) -> str:
    """The answer: how many networks one dropout network is worth, and at what cost."""
    method, point = headline(comparison)
    data = comparison.data
    what = method.title(point.size)
    if method.name == "dropout":
        what = "one dropout network (weight scaling)"
    size = "" if data["train_size"] is None else f" with {data['train_size']:,} training examples"
    noise = f", {data['label_noise']:.0%} of them mislabelled," if data["label_noise"] else ""
    first, *others = comparison.curve_scores
    text = (
        f"On {data['name']}{size}{noise} {what} is worth {in_words(point.worth[first])} "
        f"independently trained networks in {SCORES[first].title}"
    )
    cost, one = point.cost, comparison.method("plain").points[0].cost
    if cost is not None and one is not None:
        training = cost.train_flops / one.train_flops
        inference = cost.predict_flops / one.predict_flops
        text += f", for {training:.1f}x the training and {inference:.1f}x the inference cost of one"
    also = [f"{in_words(point.worth[score])} in {SCORES[score].title}" for score in others]
    text += f"; {', '.join(also[:-1])} and {also[-1]}. "
    if not method.retrained:
        text += "The intervals are for this one network, not for training it anew. "
    return text + verdict_sentence(comparison, point)


def in_words(worth: EnsembleEquivalent) -> str:
    """An equivalent within a sentence.

    Example:
        >>> in_words(EnsembleEquivalent(3.14, 2.4, 4.0, 10))
        '3.1 [2.4, 4.0]'
        >>> in_words(EnsembleEquivalent(math.inf, 2.4, math.inf, 10))
        'more than 10 [2.4, >10]'
    """
    value, interval = str(worth).split(" ", 1)
    value = value.replace(">", "more than ").replace("≤1", "no more than one")
    return f"{value} {interval}"


def verdict_sentence(comparison: Comparison, point: Point) -> str:
    """Whether it is enough, by the test of equivalence."""
    score = comparison.curve_scores[0]
    test = point.against_ensemble[score]
    ensemble = comparison.ensemble.size
    margin = f"{test.margin:g} {SCORES[score].unit}".rstrip()
    title = SCORES[score].title
    against = f"the average of all {ensemble}"
    p_value = f"TOST, p {_p_value(test.p_value)}"
    return {
        "equivalent": f"In {title} it is enough: equivalent to {against} within {margin} "
        f"({p_value}).",
        "better": f"In {title} it is enough: better than {against} by more than {margin}.",
        "not worse": f"In {title} it is enough: not worse than {against} by as much as {margin} "
        "(one-sided test at 5 %), and it may be better by more.",
        "worse": f"In {title} it is not enough: worse than {against} by more than {margin}.",
        "undecided": f"Whether it is enough is undecided: in {title} it is not shown to be within "
        f"{margin} of {against} ({p_value}), nor to be beyond.",
    }[test.verdict]


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"


def _times_of(cost: Cost | None, one: Cost | None) -> list[str]:
    """The FLOPs of training and of a prediction, as multiples of one network's."""
    assert cost is not None
    assert one is not None
    ratios = cost.train_flops / one.train_flops, cost.predict_flops / one.predict_flops
    return [f"{times:.0f}" if times >= 9.95 else f"{times:.1f}" for times in ratios]


TERMINAL_NOTE = (
    "worth: how many plain networks must be averaged to score as well, with its 95 % interval for "
    "new trainings and new test examples; ≤1: one does, >: all are too few. enough?: as good as "
    "all of them within the margin? Cost: FLOPs of training and of a prediction, one plain network "
    "is 1."
)


def terminal(comparison: Comparison) -> Table:
    """The table of a terminal of 80 columns: methods down, scores across."""
    first = comparison.curve_scores[0]
    wanted = ("error", "nll", "calibrated_nll", "crps", "mse")
    shown = [score for score in wanted if score in comparison.curve_scores]
    costs = costs_known(comparison)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=TERMINAL_NOTE,
    )
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    short = {"calibrated_nll": "calib.\nNLL", "error": "error\n%", "nll": "\nNLL"}
    for score in shown:
        table.add_column(short.get(score, SCORES[score].title), justify="right", no_wrap=True)
    worth_in = "calib. NLL" if first == "calibrated_nll" else SCORES[first].title
    table.add_column(f"worth,\n{worth_in}", justify="right", no_wrap=True)
    table.add_column("\nenough?", no_wrap=True)
    if costs:
        table.add_column("cost\ntrain", justify="right", no_wrap=True)
        table.add_column("\nrun", justify="right", no_wrap=True)
    one = comparison.method("plain").points[0].cost
    for method, point in comparison.table:
        cells = [
            f"{point.scores[score].mean * SCORES[score].scale:.{SCORES[score].digits}f}"
            for score in shown
        ]
        cells += ["", ""]
        if method.name != "plain":
            cells[-2:] = str(point.worth[first]), point.against_ensemble[first].verdict
        if costs:
            cells += _times_of(point.cost, one)
        table.add_row(method.title(point.size), *cells)
    return table


def title(comparison: Comparison) -> str:
    """Data set and sizes."""
    data = comparison.data
    size = "" if data["train_size"] is None else f"{data['train_size']:,} training examples, "
    noise = f"{data['label_noise']:.0%} of them mislabelled, " if data["label_noise"] else ""
    return f"{data['name']}: {size}{noise}{data['test_size']:,} test examples"


Rows = list[list[str]]


def score_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Header and rows: the scores of every point of the table, and what it cost."""
    costs = costs_known(comparison)
    header = ["method", *(_with_unit(score) for score in comparison.curve_scores)]
    if costs:
        header += ["training FLOPs", "prediction FLOPs", "parameters", "train s"]
    one = comparison.method("plain").points[0].cost
    rows = []
    for method, point in comparison.table:
        row = [method.title(point.size)]
        row += [
            format_interval(score, point.over_seeds[score]) for score in comparison.curve_scores
        ]
        if costs and point.cost is not None:
            row += _times_of(point.cost, one)
            row += [f"{point.cost.parameters:,}", f"{point.cost.train_seconds:.2f}"]
        rows.append(row)
    return header, rows


def _with_unit(score: str) -> str:
    how = SCORES[score]
    return f"{how.title}, {how.unit}" if how.unit else how.title


def worth_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Header and rows: every method's equivalents, and the verdict in the headline's score."""
    first = comparison.curve_scores[0]
    header = ["method", *(SCORES[score].title for score in comparison.curve_scores)]
    header.append(f"{SCORES[first].title} less that of all: enough?")
    rows = []
    for method, point in comparison.table:
        if method.name == "plain":
            continue
        worths = [str(point.worth[score]) for score in comparison.curve_scores]
        rows.append([method.title(point.size), *worths, _verdict(point.against_ensemble[first])])
    return header, rows


def _verdict(test: EquivalenceTest) -> str:
    low, high = test.difference.low, test.difference.high
    return f"{test.difference.mean:+.3f} [{low:+.3f}, {high:+.3f}]: {test.verdict}"


def table_note(comparison: Comparison) -> str:
    """What ± is, and what it leaves out."""
    first = comparison.curve_scores[0]
    point = comparison.method("plain").points[0]
    methods = {method.name: method for method in comparison.methods}
    text = (
        "±: half the 95 % interval for new trainings, on these test examples. New test examples "
        "would move all methods together: with them one plain network has "
        f"{format_interval(first, point.scores[first], unit=True)} in {SCORES[first].title}. "
        "Intervals are for the mean over trainings on these training examples, and each stands "
        "alone: none is widened because there are many. "
    )
    if not all(method.retrained for method in comparison.methods):
        text += (
            "A row without ± is of one given network, and the intervals of what that is worth "
            "hold for it, not for training it anew. "
        )
    text += "The scores here are means over all networks of a replicate"
    if "dropout" in methods and "monte-carlo" in methods and methods["dropout"].points[-1].size > 1:
        text += (
            "; masks are of one dropout network of each, so that their row and that of one dropout "
            "network are of different networks"
        )
        if comparison.mask_curve is not None:
            text += ", and only the figure of masks compares the same ones"
    profiled = "ECE, AURC, AUROC, entropy and mutual information are"
    if comparison.task == "regression":
        profiled = "Coverage is"
    text += f". {profiled} of the first networks of each, as many as the row says."
    if costs_known(comparison):
        text += " FLOPs are multiples of one plain network's."
    return text


def profile_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Header and rows: calibration, selection, detection."""
    scores = [
        score
        for score in PROFILE_SCORES
        if any(score in point.scores for _, point in comparison.table)
    ]
    rows = []
    for method, point in comparison.table:
        found = [
            format_interval(score, point.scores[score]) if score in point.scores else "n/a"
            for score in scores
        ]
        rows.append([method.title(point.size), *found])
    return ["method", *(_with_unit(score) for score in scores)], rows


def diversity_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Header and rows: how the members of averages differ."""
    found = comparison.diversity
    if not found:
        return [], []
    kinds = list(found[0].ambiguity)
    numbers = [
        ("disagreement", "disagreement, %", 100, 2),
        ("pairwise_kl", "pairwise KL, nats", 1, 4),
        ("q_statistic", "Q", 1, 3),
        ("mutual_information", "MI, nats", 1, 4),
    ]
    numbers = [entry for entry in numbers if getattr(found[0], entry[0]) is not None]
    header = ["members", *(name for _, name, _, _ in numbers)]
    header += [f"{kind}: members - diversity = pool" for kind in kinds]
    rows = []
    for one in found:
        label = comparison.method(one.method).label.format(n=one.size)
        row = [label]
        row += [
            _plain_interval(getattr(one, name), scale, digits) for name, _, scale, digits in numbers
        ]
        for kind in kinds:
            parts = one.ambiguity[kind]
            row.append(
                f"{parts.members.mean:.4f} - {parts.diversity.mean:.4f} = {parts.pool.mean:.4f}"
            )
        rows.append(row)
    return header, rows


def _plain_interval(interval: Interval, scale: int, digits: int) -> str:
    text = f"{interval.mean * scale:.{digits}f}"
    if interval.low is None or interval.high is None or math.isnan(interval.mean):
        return text
    return f"{text}±{(interval.high - interval.low) / 2 * scale:.{digits}f}"


def reading_help(comparison: Comparison) -> dict[str, str]:
    """For each figure a sentence or two on what it shows, with its main numbers."""
    method, point = headline(comparison)
    first = comparison.curve_scores[0]
    name = SCORES[first].title
    ensemble = comparison.ensemble
    of_ensemble = format_interval(first, ensemble.over_seeds[first], unit=True)
    of_point = format_interval(first, point.over_seeds[first], unit=True)
    found = {
        "Score against cost": f"{name} of {method.title(point.size)} is {of_point}, of the average "
        f"of {ensemble.size} plain networks {of_ensemble}. Further down is better, further left is "
        "cheaper; a point below the blue curve does better than an ensemble of the same cost. "
        "Bands and bars are 95 % intervals for new trainings on these test examples.",
        "What the number means": "Where the blue curve meets the line of a method, read down: so "
        "many plain networks score as well. The thick part of the line is the 95 % interval of "
        f"that number; it is {point.worth[first]} in {name}.",
        "What each method is worth": "How many averaged plain networks each method equals, with "
        f"95 % intervals. In the grey zone the average of all {ensemble.size} is not enough.",
        "Score against other costs": f"The same {name} against seconds, parameters and bytes. A "
        "Monte-Carlo average keeps one network's parameters.",
        "Learning curves": "Mean of one network in each replicate; dashed on training examples. "
        "The distance between a solid line and its dashed one is overfitting.",
        "Why averages are better": "An average's loss is its members' mean loss less their "
        "diversity. Further left are better members, further up more diverse ones; along a grey "
        "line the average has the same loss.",
        "Calibration and selection": "Left: on the diagonal, probabilities are what they say; "
        "below it they promise too much. Right: the error if only the most confident are answered.",
        "First-layer features": "Each tile shows the weights into one unit, red positive and blue "
        "negative, on a scale of its own.",
        "Where the verdict turns": f"How many plain networks one dropout network is worth in "
        f"{name}, at every value that was tried; dotted, the largest average.",
    }
    curve = comparison.mask_curve
    if curve is not None:
        found["How many masks"] = (
            f"Weight scaling reads the network once. In {name} the average of masks needs "
            f"{curve.masks_needed[first]} of them to do as well."
        )
    if comparison.exact is not None:
        exact = comparison.exact
        gaps = [
            _plain_interval(gap["nll"], 1, 4) for gap in (exact.nonlinearity_gap, exact.pool_gap)
        ]
        found["All masks of a small network"] = (
            f"A network of {exact.num_units} hidden units, averaged over all "
            f"{exact.num_masks:,} masks. In NLL weight scaling less the geometric mean is "
            f"{gaps[0]} nats (what the non-linearity costs), the geometric less the arithmetic "
            f"mean {gaps[1]} nats (what the kind of average costs)."
        )
    if comparison.overfitting:
        score = next(s for s in ("error", "mse") if s in comparison.overfitting[0].gap)
        gaps_of = {
            one.networks: format_interval(score, one.gap[score], unit=True)
            for one in sorted(comparison.overfitting, key=lambda one: one.train_size)
        }
        found["Overfitting"] = (
            "One network trained on fewer examples for as many steps. With all examples the gap "
            f"between test and training {SCORES[score].title} is {gaps_of['plain']} without "
            f"dropout and {gaps_of['dropout']} with it."
        )
    if comparison.co_adaptation:
        layers = {
            kind: list(one.correlation.values()) for kind, one in comparison.co_adaptation.items()
        }
        if all(layers.values()):
            last = {kind: _plain_interval(of[-1], 1, 3) for kind, of in layers.items()}
            found["Co-adaptation"] = (
                "Hidden units of the networks, read without dropout. In the last hidden layer the "
                f"mean absolute correlation of two units is {last['plain']} without dropout and "
                f"{last['dropout']} with it."
            )
    return found


def write(comparison: Comparison, out: Path) -> list[Path]:
    """Writes the report and everything that it is made of into a folder.

    Args:
        comparison: what was found.
        out: the folder; files of the same names are replaced.

    Raises:
        OSError: a file could not be written. Those written before it are whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []

    def put(name: str, text: str) -> None:
        write_text(out / name, text)
        written.append(out / name)

    put("results.json", comparison.to_json())
    put("results.schema.json", Comparison.json_schema())
    put("scores.csv", scores_csv(comparison))
    help_of = reading_help(comparison)
    images = []
    for name, draw in FIGURES.items():
        figure = draw(comparison)
        if figure is None:
            continue
        path = out / f"{draw.__name__}.png"
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, dpi=110, format="png")
        partial.replace(path)
        written.append(path)
        images.append(
            {
                "title": name,
                "file": path.name,
                "svg": _inline_svg(figure, draw.__name__),
                "help": help_of[name],
            }
        )
    put("report.md", _render("report.md.jinja", comparison, images))
    put("report.html", _render("report.html.jinja", comparison, images))
    return written


def scores_csv(comparison: Comparison) -> str:
    """Every score of every method at every size, a line each."""
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


def _render(template: str, comparison: Comparison, images: list[dict[str, str]]) -> str:
    text = resources.files("jdrop.study").joinpath(template).read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=template.endswith("html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    shown = {score for _, point in comparison.table for score in point.scores}
    tables = {
        "Scores": score_table(comparison),
        "Worth in plain networks": worth_table(comparison),
        "Calibration, selection, detection": profile_table(comparison),
        "Diversity": diversity_table(comparison),
    }
    return environment.from_string(text).render(
        title=title(comparison),
        sentence=sentence(comparison),
        comparison=comparison,
        tables={name: table for name, table in tables.items() if len(table[0]) > 1},
        images=images,
        definitions={score: how for score, how in SCORES.items() if score in shown},
        table_note=table_note(comparison),
        has_costs=costs_known(comparison),
    )


def _inline_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element whose identifiers are unique to it on a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
