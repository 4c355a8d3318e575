"""The gallery of reports: its table and pictures are made from the results themselves."""

import csv
import html
import math
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from jdrop.statistics import EnsembleEquivalent

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
    """Fills in the table and the pictures of the gallery."""
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


def reports() -> str:
    """For each report, a picture that leads to it."""
    return "\n\n".join(
        f"### {title(folder)}\n\n"
        f"[![Differences to all plain networks]({folder.name}/report.svg)]"
        f"({folder.name}/report.html)\n\n"
        f"[The report]({folder.name}/report.html), its [numbers]({folder.name}/scores.csv)."
        for folder in report_folders()
    )
