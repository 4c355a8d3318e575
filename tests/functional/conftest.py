"""Fixtures over all dtypes, and over all functions that take a rate."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from dropouts import DTYPES, TAKES_A_RATE


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest):
    """Each float and complex dtype, with 64-bit types enabled if it needs them."""
    with jax.enable_x64(request.param in ("float64", "complex128")):
        yield np.dtype(request.param)


@pytest.fixture(params=TAKES_A_RATE)
def takes_a_rate(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return TAKES_A_RATE[request.param]
