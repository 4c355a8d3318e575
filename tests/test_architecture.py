"""The rooms of the package: imports point one way, and every public name says what it is."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jdrop

PACKAGE = Path(jdrop.__file__).parent

# From the ground up: a room may import only rooms before it.
ROOMS = [
    "annotations",
    "bits",
    "orders",
    "functional",
    "stochastic_depth",
    "attention",
    "draws",
    "dependence",
    "sites",
    "network",
    "attention_sites",
    "calls",
    "swapping",
    "linen_swap",
    "linen_network",
    "linen",
    "nnx_swap",
    "nnx_network",
    "nnx",
    "auditing",
    "convolutions",
    "losses",
    "constraints",
    "train",
    "meshes",
    "memory",
    "batching",
    "ensemble",
    "early_stopping",
    "inference",
    "metrics",
    "statistics",
    "thinned",
    "study",
]

# What a room may import beside jax, jdrop and the standard library.
FOREIGN = {
    "annotations": {"jaxtyping"},
    "bits": {"numpy"},
    "functional": {"numpy"},
    "attention": {"numpy"},
    "draws": {"numpy"},
    "linen_swap": {"flax"},
    "linen_network": {"flax"},
    "linen": {"flax"},
    "nnx_swap": {"flax"},
    "nnx_network": {"flax"},
    "nnx": {"flax"},
    "auditing": {"flax"},
    "thinned": {"numpy", "optax"},
    "losses": {"optax"},
    "constraints": {"optax"},
    "train": {"optax"},
    "ensemble": {"optax"},
    "early_stopping": {"numpy"},
    "inference": {"numpy"},
    "metrics": {"numpy"},
    "statistics": {"numpy", "scipy"},
    "study": {
        "click",
        "flax",
        "jinja2",
        "matplotlib",
        "numpy",
        "optax",
        "orbax",
        "pandas",
        "pooch",
        "pydantic",
        "rich",
        "scipy",
        "sklearn",
        "tensorboardX",
        "threadpoolctl",
    },
}

ALL_FILES = sorted(PACKAGE.rglob("*.py"))
FILES = [path for path in ALL_FILES if path.name != "__init__.py"]


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    below = {*ROOMS[: ROOMS.index(room)], *({room} if path.parent != PACKAGE else ())}
    for module in imported_modules(path):
        top, *rest = module.split(".")
        if top == "jdrop":
            named = rest[0] if rest and rest[0] in ROOMS else "functional"
            assert named in below, f"{room} imports {module}"
        elif top != "jax" and top not in sys.stdlib_module_names:
            assert top in FOREIGN.get(room, ()), f"{room} imports {module}"


def test_importing_jdrop_costs_what_importing_jax_costs():
    heavy = ("flax", "optax", "matplotlib", "sklearn", "click", "rich", "scipy.stats")
    program = f"import sys, jdrop; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_library_needs_neither_jaxtyping_nor_the_study():
    """With what only extras install made unimportable, every room but the study's imports."""
    program = (
        "import sys\n"
        "for name in ('jaxtyping', 'beartype', 'click', 'jinja2', 'matplotlib', 'orbax',"
        " 'pandas', 'pooch', 'pydantic', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import jdrop, jdrop.linen, jdrop.nnx, jdrop.train, jdrop.ensemble, jdrop.inference\n"
        "import jdrop.early_stopping, jdrop.metrics, jdrop.statistics, jdrop.thinned\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def public_objects():
    for path in FILES:
        name = ".".join(("jdrop", *path.relative_to(PACKAGE).with_suffix("").parts))
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or getattr(value, "__module__", None) != name:
                continue
            if inspect.isfunction(inspect.unwrap(value)) or inspect.isclass(value):
                yield f"{name}.{attribute}", value


PUBLIC = dict(public_objects())


@pytest.mark.parametrize("name", PUBLIC)
def test_every_function_and_class_has_a_docstring(name):
    assert inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_a_key_comes_first_and_has_no_default(name):
    if inspect.isclass(PUBLIC[name]):
        return
    parameters = inspect.signature(PUBLIC[name]).parameters
    if "key" in parameters:
        assert next(iter(parameters)) == "key"
        assert parameters["key"].default is inspect.Parameter.empty


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_have_at_most_500_lines(path):
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= 500, f"{path.relative_to(PACKAGE)} has {num_lines} lines"


@pytest.mark.parametrize("room", ["network", "train"])
def test_networks_and_their_training_do_not_mention_thinning(room):
    text = (PACKAGE / f"{room}.py").read_text()
    assert not re.findall(r"\bthin(?:s|ned|ning)?\b", text, re.IGNORECASE)


def test_no_junk_drawers():
    names = {path.stem for path in FILES}
    assert not names & {"utils", "common", "helpers", "core", "misc", "types"}
