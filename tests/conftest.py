"""Strict modes for every test; see also `[tool.pytest.ini_options]` in pyproject.toml."""

import os

# Eight devices on one machine, for the tests of sharding; read when jax starts its backend.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
)

import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
gc.set_threshold(100_000, 50, 50)  # Tracing makes many objects; to look for cycles takes long.

TESTS = Path(__file__).parent

# Tests in which compiling takes longer than what is compiled, and which do not compare the last
# bits of floats: less optimized code rounds otherwise.
SMALL_PROGRAMS = [
    "functional/test_arguments.py",
    "functional/test_sharding.py",
    "functional/test_transformations.py",
    "metrics",
    "study/test_evaluation.py",
    "study/test_methods.py",
    "study/test_theory.py",
    "study/test_training.py",
    "test_at_dropout.py",
    "test_bits.py",
    "test_attention.py",
    "test_ensemble.py",
    "test_enumeration.py",
    "test_inference.py",
    "test_layers.py",
    "test_nnx.py",
    "test_other_libraries.py",
    "test_randomness.py",
    "test_readme.py",
    "test_train.py",
    "thinned",
]


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles small programs without most optimizations."""
    small = any(request.path.is_relative_to(TESTS / name) for name in SMALL_PROGRAMS)
    jax.config.update("jax_disable_most_optimizations", small)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A fresh key at each call, the same ones in each run."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(2012), next(counter))
