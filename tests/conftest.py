"""Strict modes of JAX for every test; pyproject.toml sets those of pytest."""

import os

# The tests of sharding need eight devices. JAX reads this when it starts its backend.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
)

import gc
import itertools
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# Tracing makes many objects, and each search for cycles among them takes long.
gc.set_threshold(100_000, 50, 50)

TESTS = Path(__file__).parent

FULLY_OPTIMIZED = {
    # These compare the last bits of floats, which less optimized code rounds otherwise.
    "functional/test_dtypes.py",
    "functional/test_rates.py",
    "functional/test_weights.py",
    "test_linen.py",
    # These compare results with those of another process, which optimizes fully.
    "study/test_cli.py",
    "study/test_comparison.py",
    # This runs large arrays, which takes longer than compiling does.
    "functional/test_masks.py",
}
"""The files whose programs are compiled with all optimizations."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        help="run tests marked slow, and all cases of tests marked grid instead of one",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out slow tests and most cases of grids, unless all shall run.

    The case of a grid that runs is the one whose name has the smallest hash: the first is often the
    simplest. A test that the command line names always runs.
    """
    if config.getoption("--all"):
        return
    grids = defaultdict(list)
    left_out = set()
    for item in items:
        if any(item.nodeid == name or item.nodeid.startswith(f"{name}[") for name in config.args):
            continue
        if item.get_closest_marker("slow"):
            left_out.add(item)
        elif item.get_closest_marker("grid"):
            grids[item.nodeid.partition("[")[0]].append(item)
    for cases in grids.values():
        left_out.update(sorted(cases, key=lambda item: zlib.crc32(item.name.encode()))[1:])
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles without most optimizations, since compiling a test takes longer than running it."""
    name = request.path.relative_to(TESTS).as_posix()
    jax.config.update("jax_disable_most_optimizations", name not in FULLY_OPTIMIZED)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A function that returns a fresh key at each call; every run has the same keys."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(2012), next(counter))
