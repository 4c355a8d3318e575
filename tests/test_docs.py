"""The pages' code runs, their links lead somewhere, and the examples run."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

import jdrop

DOCS = Path(__file__).parent.parent / "scripts" / "docs"
RESULTS = DOCS.parent / "results"
PAGES = sorted((DOCS / "pages").rglob("*.md"))
GITHUB_PAGES = sorted((DOCS.parent.parent / ".github").glob("*.md"))
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def name(path):
    return path.name


def cases(paths, slow):
    """Parameters for `paths`; those with the names `slow` run with `--all` only."""
    marks = {name: pytest.mark.slow for name in slow}
    return [pytest.param(path, marks=marks.get(path.name, ()), id=path.name) for path in paths]


@pytest.mark.parametrize(
    "page",
    cases([page for page in PAGES if python_blocks(page)], slow=["your_data.md", "examples.md"]),
)
def test_python_blocks_of_a_page_run_in_order(page):
    namespace = {}
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "example", cases(EXAMPLES, slow=["one_dropout_network.py", "flax_mnist.py"])
)
def test_examples_run(example, capsys):
    assert len(example.read_text().splitlines()) < 60
    runpy.run_path(str(example))
    output = capsys.readouterr().out
    assert output
    # Some examples print whether what they claim is true.
    assert "False" not in output


def test_the_site_shows_every_example():
    shown = (DOCS / "pages" / "examples.md").read_text()
    assert all(f'--8<-- "{example.name}"' in shown for example in EXAMPLES)


@pytest.mark.parametrize("page", GITHUB_PAGES, ids=name)
def test_links_between_files_lead_somewhere(page):
    """Those of the site are checked when it is built."""
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *GITHUB_PAGES, *RESULTS.glob("*.md")], ids=name)
def test_files_that_a_page_names_exist(page):
    names = re.findall(r"`((?:jdrop|scripts|tests)/[\w./-]*)`", page.read_text())
    assert [file for file in names if not (DOCS.parent.parent / file).exists()] == []


def test_the_version_is_the_same_everywhere():
    root = DOCS.parent.parent
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text()
    assert f"\n## {version}" in (root / ".github" / "CHANGELOG.md").read_text()
    assert jdrop.__version__ == version
