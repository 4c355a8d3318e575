"""The report's files: JSON, CSV, figures, and the page as HTML and Markdown."""

from importlib import resources
from pathlib import Path

import jinja2

from jdrop.study.atomic_writes import replacing, write_text
from jdrop.study.report.captions import TITLES, captions
from jdrop.study.report.cautions import cautions
from jdrop.study.report.csv_files import scores_csv, sweep_csv
from jdrop.study.report.figures import FIGURES
from jdrop.study.report.figures.svg import inline_svg
from jdrop.study.report.numbers import margin_text
from jdrop.study.report.sentence import sentence
from jdrop.study.report.tables import (
    difference_table,
    diversity_table,
    epochs_table,
    influence_table,
    profile_table,
    score_note,
    score_table,
    sweep_table,
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
    if comparison.sweep:
        write_file("sweep.csv", sweep_csv(comparison))
    texts = captions(comparison)
    images = []
    for name, draw in FIGURES.items():
        figure = draw(comparison)
        if figure is None:
            continue
        path = out / f"{name}.png"
        with replacing(path) as partial:
            figure.savefig(partial, dpi=160, format="png")
        written.append(path)
        images.append(
            {
                "title": TITLES[name],
                "file": path.name,
                "svg": inline_svg(figure, name),
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
        "Differences to plain networks": difference_table(comparison),
        "Scores": score_table(comparison),
        "Worth in plain networks": worth_table(comparison),
        "Own epochs and the same epochs": epochs_table(comparison),
        "Which examples carry the difference": influence_table(comparison),
        "Sweep": sweep_table(comparison),
        "Calibration, selective prediction, detection": profile_table(comparison),
        "Diversity": diversity_table(comparison),
    }
    margins = [
        f"{SCORES[score].title} {margin_text(score, margin)}"
        for score, margin in comparison.margins.items()
    ]
    notes = {
        "Differences to plain networks": "In brackets: 95 % intervals for new trainings and new "
        "test examples; less is better. The verdict asks whether a method is as good as the "
        f"average of all {comparison.ensemble.size} plain networks within the margin, by the 90 % "
        "interval of the difference. Equivalent: within the margin on both sides. Better or worse: "
        "wholly beyond the margin. Not worse: only the upper end is below the margin. Undecided: "
        "none of these. Refused: too few data. p is the p-value of what the verdict says. Margins: "
        f"{', '.join(margins)}.",
        "Scores": f"{score_note(comparison)} Lower scores are better. Averages are arithmetic "
        "means of probabilities.",
        "Worth in plain networks": "How many plain networks must be averaged to score as well, "
        "with its 95 % interval. ≤1: one does. >: all are too few. Not resolved: the interval "
        "holds every count, or the data are too few.",
        "Own epochs and the same epochs": "Left: each method is trained for the epochs, and with "
        "the weight decay, that cross-validation on the training examples chose for it. Right: all "
        "methods are trained equally long.",
        "Which examples carry the difference": "Losses are means over replicates. “Without the "
        "best 5”: the difference without the five examples that favour the method most.",
        "Sweep": "Each combination trains networks of its own, so its numbers differ by chance "
        "from those of the other tables. ±: half the 95 % interval for new trainings and new test "
        "examples.",
    }
    return environment.from_string(text).render(
        title=title(comparison),
        sentence=sentence(comparison),
        cautions=cautions(comparison),
        comparison=comparison,
        tables={name: table for name, table in tables.items() if len(table[0]) > 1},
        images=images,
        definitions={name: score for name, score in SCORES.items() if name in shown},
        notes=notes,
    )
