"""The report's files: JSON, CSV, figures, and the page as HTML and Markdown."""

import io
import re
from importlib import resources
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from jdrop.study.atomic_writes import replacing, write_text
from jdrop.study.report.captions import TITLES, captions
from jdrop.study.report.figures import FIGURES
from jdrop.study.report.sentence import sentence
from jdrop.study.report.tables import (
    diversity_table,
    profile_table,
    score_note,
    score_table,
    scores_csv,
    worth_table,
)
from jdrop.study.results import Comparison
from jdrop.study.scores import SCORES


def write(comparison: Comparison, out: Path) -> list[Path]:
    """Writes the results, the figures and the report into a folder.

    Args:
        comparison: the results.
        out: the folder; files of the same names are replaced.

    Returns:
        The paths of the files.

    Raises:
        OSError: if a file cannot be written. The files written before are complete.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []

    def write_file(name: str, text: str) -> None:
        write_text(out / name, text)
        written.append(out / name)

    write_file("results.json", comparison.to_json())
    write_file("results.schema.json", Comparison.json_schema())
    write_file("scores.csv", scores_csv(comparison))
    texts = captions(comparison)
    images = []
    for name, draw in FIGURES.items():
        figure = draw(comparison)
        if figure is None:
            continue
        path = out / f"{name}.png"
        with replacing(path) as partial:
            figure.savefig(partial, dpi=110, format="png")
        written.append(path)
        images.append(
            {
                "title": TITLES[name],
                "file": path.name,
                "svg": _inline_svg(figure, name),
                "caption": texts[name],
            }
        )
    write_file("report.md", render("report.md.jinja", comparison, images))
    write_file("report.html", render("report.html.jinja", comparison, images))
    return written


def title(comparison: Comparison) -> str:
    """Returns the name and the sizes of the data set."""
    data = comparison.data
    size = "" if data["train_size"] is None else f"{data['train_size']:,} training examples, "
    noise = f"{data['label_noise']:.0%} of them mislabelled, " if data["label_noise"] else ""
    return f"{data['name']}: {size}{noise}{data['test_size']:,} test examples"


def render(template: str, comparison: Comparison, images: list[dict[str, str]]) -> str:
    """Fills a template that lies beside this file."""
    text = resources.files("jdrop.study.report").joinpath(template).read_text("utf-8")
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
        "Calibration, selective prediction, detection": profile_table(comparison),
        "Diversity": diversity_table(comparison),
    }
    return environment.from_string(text).render(
        title=title(comparison),
        sentence=sentence(comparison),
        comparison=comparison,
        tables={name: table for name, table in tables.items() if len(table[0]) > 1},
        images=images,
        definitions={name: score for name, score in SCORES.items() if name in shown},
        score_note=score_note(comparison),
    )


def _inline_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element whose identifiers are unique on the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
