"""The report's files: JSON, CSV, figures, and the page as HTML and Markdown."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from jdrop.study.atomic_writes import replacing, write_text
from jdrop.study.report.captions import TITLES, captions
from jdrop.study.report.cautions import cautions
from jdrop.study.report.choices import choices_table, resamples_text
from jdrop.study.report.csv_files import scores_csv, sweep_csv
from jdrop.study.report.figures import FIGURES
from jdrop.study.report.figures.svg import inline_svg
from jdrop.study.report.numbers import margin_text
from jdrop.study.report.sentence import answer, second_score
from jdrop.study.report.tables import (
    cost_table,
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


def _difference_note(comparison: Comparison, score: str) -> str:
    margin = margin_text(score, comparison.margins[score])
    text = f"Margin: {margin}."
    if score != comparison.curve_scores[0]:
        return f"{text} Intervals, verdicts and p-values are as above."
    return (
        "In brackets behind a difference: its 95 % interval for new trainings and new test "
        "examples; less is better. The verdict asks whether a method is as good as the average of "
        f"all {comparison.ensemble.size} plain networks within the margin. The 90 % interval "
        "decides it. Equivalent: it lies within the margin on both sides. Better or worse: it lies "
        "wholly beyond the margin. Not worse: its upper end lies within the margin, its lower end "
        "beyond it. Undecided: none of these. Refused: too few replicates, examples or groups, or "
        "so few of them carry the difference that its interval cannot be trusted. p: the one-sided "
        "p-value of the hypothesis that the verdict rejects (for “equivalent”, the larger of two). "
        f"{text}"
    )


def title(comparison: Comparison) -> str:
    """Returns the name and the sizes of the data set."""
    data = comparison.data
    if comparison.is_per_token:
        parts = (
            f"{data[f'{part}_size']:,} {name} tokens in {data[f'{part}_sequences']:,} sequences"
            for part, name in (("train", "training"), ("test", "test"))
        )
        return f"{data['name']}: {', '.join(parts)}"
    size = "" if data["train_size"] is None else f"{data['train_size']:,} training examples, "
    noise = f"{data['label_noise']:.0%} of them mislabelled, " if data["label_noise"] else ""
    return f"{data['name']}: {size}{noise}{data['test_size']:,} test examples"


def without_tags(value: Any) -> Any:
    r"""Escapes what Markdown would take for HTML, as in names of methods and files.

    What the template marks as `safe` stays, since it is of another type.

    Example:
        >>> print(without_tags("<b>mine</b>, p < 0.1"))
        \<b>mine\</b>, p < 0.1
    """
    return re.sub(r"<(?=[A-Za-z/!?])", r"\<", value) if type(value) is str else value


def render(template: str, comparison: Comparison, images: list[dict[str, str]]) -> str:
    """Fills a template that lies beside this file."""
    shown = {score for _, point in comparison.table for score in point.scores}
    scores = (comparison.curve_scores[0], second_score(comparison))
    differences = {score: f"Differences in {SCORES[score].title}" for score in scores}
    tables = {
        **{name: difference_table(comparison, score) for score, name in differences.items()},
        "Scores": score_table(comparison),
        "Worth in plain networks": worth_table(comparison),
        "Own epochs and the same epochs": epochs_table(comparison),
        "How sure the choice of epochs is": choices_table(comparison),
        "Cost": cost_table(comparison),
        "Which examples carry the difference": influence_table(comparison),
        "Sweep": sweep_table(comparison),
        "Calibration, selective prediction, detection": profile_table(comparison),
        "Diversity": diversity_table(comparison),
    }
    notes = {
        **{name: _difference_note(comparison, score) for score, name in differences.items()},
        "Scores": f"{score_note(comparison)} Lower scores are better. Averages are arithmetic "
        "means of probabilities.",
        "Worth in plain networks": "How many plain networks must be averaged to score as well, "
        "with its 95 % interval. ≤1: one does. >: all are too few. Not resolved: the interval "
        "holds every count, or the data are too few.",
        "Own epochs and the same epochs": "Left: each method is trained for the epochs, and with "
        "the weight decay, that cross-validation on the training examples chose for it. Right: all "
        "methods are trained equally long. A method that ends by itself, such as early stopping, "
        "has no left half.",
        "How sure the choice of epochs is": "Loss: the mean over left-out training examples; the "
        "smallest is chosen. Share: of "
        f"{resamples_text(comparison)}, how many choose these epochs again. It is not the "
        "probability that the choice is right: of two candidates that are equally good, each may "
        "be chosen. The networks of the folds stay the same, so the shares hold the chance of the "
        "examples, not that of the trainings. The intervals of this report hold neither.",
        "Cost": "FLOPs as multiples of the training, or the prediction, of one plain network. "
        "Search: the cross-validation that chose epochs and weight decay. The ratio of training "
        "costs in the answer is that of two rows of “training with search”.",
        "Which examples carry the difference": "Losses are means over replicates. Gains: the "
        "differences of the examples that favour the method, added up over the number of all "
        "examples; losses: those of the others. “Half comes from”: the fewest examples that carry "
        "half of the difference. “Without the top 5”: the mean difference of the other examples "
        "if the five that contribute most to the difference are left out.",
        "Sweep": "Each combination trains networks of its own, so its numbers differ by chance "
        "from those of the other tables. ±: half the 95 % interval for new trainings and new test "
        "examples.",
    }
    return fill(
        "jdrop.study.report",
        template,
        title=title(comparison),
        answer=answer(comparison),
        cautions=cautions(comparison),
        comparison=comparison,
        tables={name: table for name, table in tables.items() if len(table[0]) > 1},
        images=images,
        definitions={name: score for name, score in SCORES.items() if name in shown},
        notes=notes,
    )


def fill(package: str, template: str, **values: Any) -> str:
    """Fills a template that lies in a package; `style` holds the style sheet of all pages.

    Raises:
        jinja2.UndefinedError: a value of the template is missing.
    """
    is_html = template.endswith("html.jinja")
    environment = jinja2.Environment(
        autoescape=is_html,
        finalize=None if is_html else without_tags,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = resources.files(package).joinpath(template).read_text("utf-8")
    style = resources.files("jdrop.study.report").joinpath("page.css").read_text("utf-8")
    return environment.from_string(text).render(style=style, **values)
