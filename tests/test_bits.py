"""The generator's contract: what a mask may depend on, and how probable it says that it is."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import binomial_bounds

from jdrop import bits

RATES = [0.0, 1e-9, 2**-17, 0.05, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.95, 1 - 2**-16, 1 - 1e-9, 1.0]


def probability(rate) -> float:
    return int(bits.threshold(rate)) / bits.LEVELS


@pytest.mark.parametrize("rate", RATES)
def test_the_realised_probability_is_the_nearest_there_is(rate):
    assert probability(rate) == pytest.approx(1 - rate, abs=0.5 / bits.LEVELS) or (
        # Rounded to 0, it would leave nothing to scale.
        0 < 1 - rate < 0.5 / bits.LEVELS and probability(rate) == 1 / bits.LEVELS
    )


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_number_and_an_array_have_one_threshold(rate, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        rate = float(np.dtype(dtype).type(rate))
        assert bits.threshold(rate) == bits.threshold(jnp.asarray(rate, dtype))
        assert bits.threshold(rate) == jax.jit(bits.threshold)(jnp.asarray(rate, dtype))


@pytest.mark.parametrize("rate", [-1e-9, 1 + 1e-9, math.nan, math.inf, -math.inf])
def test_out_of_range_everything_is_kept(rate):
    with jax.enable_x64(True):
        assert bits.threshold(rate) == bits.LEVELS
        assert bits.threshold(jnp.asarray(rate)) == bits.LEVELS


def test_a_higher_rate_never_keeps_more():
    thresholds = bits.threshold(jnp.linspace(0.0, 1.0, 2**18 + 1))
    assert (jnp.diff(thresholds.astype(jnp.int32)) <= 0).all()


@pytest.mark.parametrize("rate", RATES)
def test_the_mask_has_the_probability_of_the_threshold(rate, getkey):
    n = 2**20
    kept = int(bits.draw_mask(getkey(), (n,), bits.threshold(rate), None).sum())
    low, high = binomial_bounds(n, probability(rate))
    assert low <= kept <= high, f"kept {kept} of {n}, expected {low} to {high}"
