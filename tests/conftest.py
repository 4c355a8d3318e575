"""Strict modes for every test; see also `[tool.pytest.ini_options]` in pyproject.toml."""

import os

# Eight devices on one machine, for the tests of sharding; read when jax starts its backend.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
)

import itertools
from collections.abc import Callable

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A fresh key at each call, the same ones in each run."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(2012), next(counter))
