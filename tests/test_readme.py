"""The README's code runs, its links lead somewhere, and its tests are those of `.ci/run`."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_python_blocks_run():
    """One after the other, in one namespace, as a reader would paste them."""
    namespace = {}
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), namespace)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README.read_text()))
def test_links_to_files_lead_somewhere(link):
    if not link.startswith("http"):
        assert (README.parent / link).exists()


def test_the_command_of_the_tests_is_what_continuous_integration_runs():
    commands = blocks("bash")
    script = (README.parent / ".ci" / "run").read_text()
    assert len(commands) == 2
    assert commands[1].strip() in script
