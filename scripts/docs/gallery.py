"""The gallery of reports: its table and pictures are made from the results themselves."""

import csv
import html
import json
import math
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from jdrop.statistics import EnsembleEquivalent, Interval
from jdrop.study.report.numbers import difference_text, significant

RESULTS = Path(__file__).parents[1] / "results"

METHODS = {
    ("dropout", 1): "one dropout network",
    ("monte-carlo", 50): "read with 50 masks",
    ("dropout-thinned", 1): "thinned",
}
SCORES = {
    "nll": "NLL",
    "calibrated_nll": "calibrated NLL",
    "brier": "Brier score",
    "error": "error",
}


def report_folders() -> list[Path]:
    """Folders of results that hold a report."""
    return sorted(path.parent for path in RESULTS.glob("*/report.html"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the first figure of each report as a picture."""
    for folder in report_folders():
        figure = re.search(r"<svg.*?</svg>", (folder / "report.html").read_text(), re.DOTALL)
        assert figure is not None, f"{folder} has a report without a figure"
        name = f"results/{folder.name}/report.svg"
        files.append(File.generated(config, name, content=figure.group()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the tables, and the pictures of the gallery."""
    if page.file.src_uri == "results/real_models.md":
        return markdown.replace("<!-- table -->", real_models_table())
    if page.file.src_uri == "results/reproduced.md":
        return markdown.replace("<!-- reproductions -->", reproductions())
    if page.file.src_uri == "results/atlas.md":
        return markdown.replace("<!-- atlas -->", atlas())
    if page.file.src_uri != "results/gallery.md":
        return markdown
    return markdown.replace("<!-- table -->", worth_table()).replace("<!-- reports -->", reports())


def title(folder: Path) -> str:
    """The title of a report: its data set, and how many examples."""
    match = re.search("<title>(.*?)</title>", (folder / "report.html").read_text())
    assert match is not None
    return html.unescape(match.group(1))


def worth_table() -> str:
    """For each report, what a dropout network is worth, read in three ways."""
    lines = [
        "| | " + " | ".join(SCORES.values()) + " |",
        "|---|" + "---|" * len(SCORES),
    ]
    for folder in report_folders():
        with (folder / "scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        largest = max(int(row["size"]) for row in rows if row["method"] == "plain")
        cells: dict[tuple[str, int, str], dict[str, str]] = {}
        for row in rows:  # The first view, which each report's sentence rests on.
            cells.setdefault((row["method"], int(row["size"]), row["score"]), row)
        lines.append(f"| **[{title(folder)}]({folder.name}/report.html)** |" + " |" * len(SCORES))
        for (method, size), label in METHODS.items():
            worths = [worth(cells[method, size, score], largest) for score in SCORES]
            lines.append(f"| {label} | " + " | ".join(worths) + " |")
    return "\n".join(lines)


def worth(row: dict[str, str], largest: int) -> str:
    """What the method of a row is worth, with its interval."""
    value, low, high = (float(row[name]) for name in ("worth", "worth_low", "worth_high"))
    assert not math.isnan(value)
    return str(EnsembleEquivalent(value, low, high, largest))


REAL_MODELS = {
    "cnn": "CNN with batch normalisation",
    "resnet": "ResNet-8",
    "vit": "vision transformer",
    "text": "LSTM, docstrings",
    "characters": "transformer, characters",
    "sets": "deep sets",
}
"""The studies of `scripts/real_models.py`, by the folders of their results."""


def real_models_table() -> str:
    """For each study of a real model, what its dropout network is worth in NLL."""
    lines = [
        "| model | NLL of one plain | one dropout − one plain | − 4 plain | enough? | worth |"
        " worth with masks |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label in REAL_MODELS.items():
        folder = RESULTS / "real-models" / name
        if not folder.exists():
            continue
        with (folder / "scores.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["score"] == "nll"]
        largest = max(int(row["size"]) for row in rows if row["method"] == "plain")
        first = {(row["method"], int(row["size"])): row for row in reversed(rows)}
        num_masks = max(size for method, size in first if method == "monte-carlo")
        dropout = first["dropout", 1]
        cells = [
            f"[{label}](real-models/{name}/report.html)",
            significant(float(first["plain", 1]["mean"])),
            difference(dropout, "minus_single"),
            difference(dropout, "minus_ensemble"),
            dropout["verdict"],
            worth(dropout, largest),
            worth(first["monte-carlo", num_masks], largest),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reproductions() -> str:
    """For each reproduced paper, how many numbers agree, its figures, and all its numbers."""
    texts = []
    for path in sorted(RESULTS.glob("reproduce/*/results.json")):
        values = json.loads(path.read_text())
        header, *rows = values["table"]["header"], *values["table"]["rows"]
        folder = f"reproduce/{path.parent.name}"
        lines = [
            f"## {values['title']}",
            "",
            f"[{values['paper']}]({values['url']}). [The report]({folder}/report.html), its "
            f"[numbers]({folder}/results.json).",
            "",
            *(f"- {sentence}" for sentence in values["answer"]),
            "",
            *(
                f"![{figure.stem}]({folder}/{figure.name})\n"
                for figure in sorted(path.parent.glob("*.png"), key=figure_number)
            ),
            f"| {' | '.join(header)} |",
            "|---" * len(header) + "|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            values["rule"],
        ]
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def figure_number(path: Path) -> int:
    """The number in the name of a figure's file; -1 without one, so that it comes first."""
    digits = re.search(r"\d+", path.stem)
    return -1 if digits is None else int(digits.group())


def atlas() -> str:
    """The sentences, the figure and the table of the stored atlas, if there is one."""
    path = RESULTS / "atlas" / "atlas.json"
    if not path.exists():
        return "No results are stored yet."
    values = json.loads(path.read_text())
    header, *rows = values["table"]["header"], *values["table"]["rows"]
    lines = [
        *(f"- {sentence}" for sentence in values["answer"]),
        "",
        "![How many plain networks one dropout network is worth](atlas/atlas.png)",
        "",
        "[The page with the command of each study](atlas/atlas.html), its "
        "[numbers](atlas/atlas.json).",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"- {sentence}" for sentence in values["left_out"]),
        *(f"- {title} failed: {sentence}" for title, sentence in values["failed"].items()),
    ]
    return "\n".join(lines)


def difference(row: dict[str, str], column: str) -> str:
    """A difference in NLL with its interval."""
    mean, low, high = (float(row[column + end]) for end in ("", "_low", "_high"))
    return difference_text("nll", Interval(mean, low, high, 0))


def reports() -> str:
    """For each report, a picture that leads to it."""
    return "\n\n".join(
        f"### {title(folder)}\n\n"
        f"[![Differences to all plain networks]({folder.name}/report.svg)]"
        f"({folder.name}/report.html)\n\n"
        f"[The report]({folder.name}/report.html), its [numbers]({folder.name}/scores.csv)."
        for folder in report_folders()
    )
