"""The bits of a mask: their probability, their layout, and the hash that draws them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import binomial_bounds
from jax.extend.random import threefry_2x32

from jdrop import bits

RATES = [0.0, 1e-9, 2**-17, 0.05, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.95, 1 - 2**-16, 1 - 1e-9, 1.0]


def probability(rate) -> float:
    return int(bits.threshold(rate)) / bits.LEVELS


@pytest.mark.parametrize("rate", RATES)
def test_the_realised_probability_is_the_nearest_of_all_levels(rate):
    assert probability(rate) == pytest.approx(1 - rate, abs=0.5 / bits.LEVELS) or (
        # Rounding to 0 would leave no element to scale.
        0 < 1 - rate < 0.5 / bits.LEVELS and probability(rate) == 1 / bits.LEVELS
    )


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_python_float_and_an_array_have_the_same_threshold(rate, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        rate = float(np.dtype(dtype).type(rate))
        assert bits.threshold(rate) == bits.threshold(jnp.asarray(rate, dtype))
        assert bits.threshold(rate) == jax.jit(bits.threshold)(jnp.asarray(rate, dtype))


@pytest.mark.parametrize("rate", [-1e-9, 1 + 1e-9, math.nan, math.inf, -math.inf])
def test_a_rate_out_of_range_keeps_everything(rate):
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


def test_the_hash_equals_the_hash_of_jax(getkey):
    first_key, second_key, first, second = jax.random.bits(getkey(), (4, 1000), jnp.uint32)
    ours = bits._threefry2x32(first_key[0], second_key[0], first, second)
    key = jnp.stack([first_key[0], second_key[0]])
    theirs = threefry_2x32(key, jnp.concatenate([first, second]))
    np.testing.assert_array_equal(jnp.concatenate(ours), theirs)


EXACT_IN = {1: 0.5, 2: 0.25, 4: 1 / 16, 8: 3 / 256, 16: 0.1}
"""For each number of bits, a rate that draws so many."""

BLOCKS = {1: 8192, 2: 8192, 4: 4096, 8: 2048, 16: 1024}
"""For each number of bits, how many elements a block has."""

SHAPES = [(16384,), (3, 8192), (5, 4096, 2), (97, 331), (1,), (2, 3, 5000), (3, 0), (70, 9, 31), ()]


def mask_in_numpy(key, shape, num_bits: int, threshold: int) -> np.ndarray:
    """The layout that `bits.py` describes, in integer arithmetic."""
    block_size = BLOCKS[num_bits]
    row_size = 1
    for size in (*reversed(shape), None):
        filled = 8 * (-row_size % block_size) <= row_size
        if size is None or (filled and row_size != 1):
            break
        row_size *= size
    rows = math.prod(shape) // row_size if row_size else 0
    row, within = np.divmod(np.arange(rows * row_size), max(row_size, 1))
    block_of_row, within = np.divmod(within, block_size)
    plane, column = np.divmod(within, bits.RUN)
    block = row * math.ceil(row_size / block_size) + block_of_row
    hashed = threefry_2x32(
        jax.random.key_data(key), jnp.asarray(np.concatenate([block, column]), jnp.uint32)
    )
    first, second = np.split(np.asarray(hashed, np.uint64), 2)
    value = (
        (second << np.uint64(32) | first) >> (plane * num_bits).astype(np.uint64)
    ) % 2**num_bits
    return (value < threshold).reshape(shape)


@pytest.mark.parametrize("num_bits", EXACT_IN)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elements_read_their_bits_by_the_layout(num_bits, shape, getkey):
    key = getkey()
    threshold = bits.threshold(EXACT_IN[num_bits])
    mask = bits.draw_mask(key, shape, threshold, None)
    expected = mask_in_numpy(key, shape, num_bits, int(threshold) >> (16 - num_bits))
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_array_of_thresholds_reads_the_same_bits_as_a_scalar(shape, getkey):
    key = getkey()
    threshold = bits.threshold(0.1)
    thresholds = jnp.full(shape, threshold)
    mask = bits.draw_mask(key, shape, thresholds, None)
    np.testing.assert_array_equal(mask, mask_in_numpy(key, shape, 16, int(threshold)))


@pytest.mark.parametrize("low", [0.1, 0.3])
def test_a_higher_rate_drops_all_that_a_lower_rate_drops(low, getkey):
    key = getkey()
    kept_at_low = bits.draw_mask(key, (1000,), bits.threshold(jnp.float32(low)), None)
    again = jax.random.clone(key)
    kept_at_high = bits.draw_mask(again, (1000,), bits.threshold(jnp.float32(low + 0.2)), None)
    assert not (kept_at_high & ~kept_at_low).any()
