"""Puts a comparison where people look: a terminal table, `results.json`, figures, `report.html`."""

import io
import re
from importlib import resources
from pathlib import Path

import jinja2
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from jdrop.study import figures
from jdrop.study.results import SCORES, Comparison, Row, format_score, write_text

SCORE_TITLES = {"error": "test error %", "nll": "test NLL", "brier": "test Brier", "ece": "ECE %"}
HEADER = ("", *SCORE_TITLES.values(), "gap %", "train s", "passes", "parameters")
LEGEND = (
    "a [b, c]: the number for the dropout networks' mean score, and for the ends of its 95 % "
    "interval; the spread of the averages of plain networks is not in it. ≤1: one plain network "
    "does as well; >: no average up to all of them does. ±: half the width of the 95 % interval "
    "over disjoint groups of networks, at fixed data."
)
FIGURES = {
    "networks": (
        figures.score_against_ensemble_size,
        "Negative log-likelihood and error on the test examples against the number of plain "
        "networks averaged; one dropout network as lines across.",
    ),
    "learning_curves": (
        figures.learning_curves,
        "Error on training and test examples against epochs, for plain and for dropout networks.",
    ),
}


def table_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The headline rows as text, in the order of `HEADER`."""
    return [
        (
            row.label,
            *(format_score(score, row.test[score]) for score in SCORES),
            "n/a" if row.gap is None else format_score("error", row.gap["error"]),
            f"{row.train_seconds:.1f}",
            f"{row.passes}",
            f"{row.parameters:,}",
        )
        for row in comparison.headline
    ]


def terminal_table(comparison: Comparison) -> Table:
    """The headline rows for a terminal of 80 columns: a column for each, a line for each score."""
    table = Table(
        title=_title(comparison),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("")
    rows = table_rows(comparison)
    for label, *_ in rows:
        table.add_column(label, justify="right", vertical="bottom", max_width=12)
    for index, name in enumerate(HEADER[1:], start=1):
        table.add_row(name, *(row[index].replace(" ± ", "±") for row in rows))
    return table


def write(comparison: Comparison, out: Path, command: str) -> list[Path]:
    """Writes `results.json`, the figures and `report.html`, the numbers first.

    Args:
        comparison: what to write.
        out: the folder, made if need be.
        command: the command that made the comparison, for the report.

    Returns:
        The files written.

    Raises:
        OSError: a file could not be written. Those written before it are whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "results.json"]
    write_text(written[0], comparison.to_json() + "\n")
    images = []
    for name, (draw, description) in FIGURES.items():
        figure = draw(comparison)
        figure.savefig(out / f"{name}.png", dpi=150)
        written.append(out / f"{name}.png")
        images.append({"svg": _inline_svg(figure, name), "description": description})
    written.append(out / "report.html")
    write_text(written[-1], _html(comparison, images, command))
    return written


def _html(comparison: Comparison, images: list[dict[str, str]], command: str) -> str:
    template = resources.files("jdrop.study").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        title=_title(comparison),
        comparison=comparison,
        header=HEADER,
        rows=table_rows(comparison),
        ensembles=[_ensemble_row(comparison, row) for row in comparison.rows],
        images=images,
        command=command,
        legend=LEGEND,
    )


def _ensemble_row(comparison: Comparison, row: Row) -> tuple[str, ...]:
    groups = row.test["nll"].num_replicates
    return (row.label, *(format_score(score, row.test[score]) for score in SCORES), f"{groups}")


def _inline_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element whose identifiers are unique to it on a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)


def _title(comparison: Comparison) -> str:
    data = comparison.data
    noise = f", {data['label_noise']:.0%} wrong labels" if data["label_noise"] else ""
    return (
        f"{data['name']}: {data['train_size']:,} training examples{noise}, "
        f"{data['test_size']:,} test examples"
    )
