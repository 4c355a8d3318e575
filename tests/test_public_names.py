"""The public names: what `__all__` lists exists, is documented, and is what the reference holds."""

import importlib
import inspect
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

MODULES = {
    "jdrop": "reference/jdrop/",
    "jdrop.linen": "reference/linen/",
    "jdrop.nnx": "reference/nnx/",
    "jdrop.network": "reference/network/",
    "jdrop.train": "reference/train/",
    "jdrop.ensemble": "reference/ensemble/",
    "jdrop.early_stopping": "reference/early_stopping/",
    "jdrop.inference": "reference/inference/",
    "jdrop.metrics": "reference/metrics/",
    "jdrop.statistics": "reference/statistics/",
    "jdrop.thinned": "reference/thinned/",
    "jdrop.auditing": "reference/auditing/",
    "jdrop.study": "reference/study/",
}
"""Public modules, and the page of the site on which each is documented."""


def public_names(module):
    """What `__all__` lists, except public modules, which have their own pages."""
    names = importlib.import_module(module).__all__
    return [name for name in names if f"{module}.{name}" not in MODULES]


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """Builds the site; for each page, the names of objects that it documents."""
    site = tmp_path_factory.mktemp("site")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--config-file", root / "scripts" / "docs" / "mkdocs.yml", "--site-dir", site]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    # An inventory of Sphinx: four lines of header, then compressed lines "name type rank page -".
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    names = {}
    for line in zlib.decompress(inventory).decode().splitlines():
        name, _, _, location, _ = line.split(" ", 4)
        page, anchor = location.split("#")
        if anchor in ("$", name):
            names.setdefault(page, set()).add(name)
    return names


@pytest.mark.parametrize("module", MODULES)
def test_public_names_exist_and_have_a_docstring(module):
    names = public_names(module)
    assert len(set(names)) == len(names)
    for name in names:
        value = getattr(importlib.import_module(module), name)
        if inspect.isclass(value) or inspect.isroutine(inspect.unwrap(value)):
            assert inspect.getdoc(value), name


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_documents_exactly_the_public_names(module, documented):
    # Objects are shown only if they have a docstring, so this is about constants and types too.
    shown = {name for name in documented[MODULES[module]] if name.rpartition(".")[0] == module}
    assert shown == {f"{module}.{name}" for name in public_names(module)}


def test_each_page_of_the_reference_is_of_a_public_module(documented):
    pages = {page for page in documented if page.startswith("reference/")}
    assert pages == set(MODULES.values())
