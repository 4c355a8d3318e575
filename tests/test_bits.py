"""The bits of a mask: their probability, their layout, and the hash that draws them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import binomial_bounds
from jax import export
from jax.extend.random import threefry_2x32

from jdrop import bits

pytestmark = pytest.mark.grid

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


EXACT_IN = {1: 0.5, 2: 0.25, 3: 0.125, 4: 1 / 16, 8: 3 / 256, 15: 0.1, 16: 0.3}
"""For each number of bits, a rate that draws so many."""

LAYOUTS = {
    (): ((), 1, 128), (1,): ((), 1, 128), (9000,): ((), 71, 128), (7, 1, 1): ((), 1, 128),
    (1, 50): ((), 1, 50), (3, 8): ((), 3, 8), (97, 331): ((), 97, 331), (64, 40): ((), 64, 40),
    (2, 197, 5): ((2,), 197, 5), (3, 2, 64, 6): ((3, 2), 64, 6), (2, 1, 33, 1, 7): ((2,), 33, 7),
    (3, 7, 9, 5): ((3,), 63, 5), (70, 9, 31): ((), 630, 31), (2, 1100, 3): ((2,), 1100, 3),
    (3, 0): ((), 3, 0), (0, 5): ((), 0, 5),
}  # fmt: skip
"""For each shape, the sizes of its leading axes, its rows and its columns."""

PART_ROWS = {1: 16, 2: 16, 3: 16, 4: 16, 8: 8, 15: 4, 16: 4}
"""For each number of bits, how many rows read a pair of random words, but 32 with 1 or 2 bits."""


def mask_in_numpy(key, shape, num_bits: int, threshold: int) -> np.ndarray:
    """The layout that `bits.py` describes, with an integer for the bits of each element."""
    lead, num_rows, columns = LAYOUTS[shape]
    grid = np.indices((math.prod(lead), num_rows, columns)).reshape(3, -1)
    lead_index, row, column = grid[:, : math.prod(shape)]
    group, row_in_group = lead_index * math.ceil(num_rows / 32) + row // 32, row % 32
    part_rows = PART_ROWS[num_bits]
    if num_bits > 2:
        column = column * (32 // part_rows) + row_in_group // part_rows
    counters = jnp.asarray(np.concatenate([group, column]), jnp.uint32)
    hashed = threefry_2x32(jax.random.key_data(key), counters)
    first, second = np.split(np.asarray(hashed, np.uint64), 2)
    pair = second << np.uint64(32) | first
    value = np.zeros(row.shape, np.int64)
    for digit in range(num_bits):
        plane = num_bits - 1 - digit
        place = 32 * plane + row_in_group
        if num_bits > 2:
            place = part_rows * plane + row_in_group % part_rows
        # The integer that is compared has the complements of the bits as digits.
        bit = ~(pair >> place.astype(np.uint64)) & np.uint64(1)
        value += bit.astype(np.int64) << digit
    return (value < threshold).reshape(shape)


@pytest.mark.parametrize("num_bits", EXACT_IN)
@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_elements_read_their_bits_by_the_layout(num_bits, shape, getkey):
    key = getkey()
    threshold = bits.threshold(EXACT_IN[num_bits])
    mask = bits.draw_mask(key, shape, threshold, None)
    expected = mask_in_numpy(key, shape, num_bits, int(threshold) >> (16 - num_bits))
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
@pytest.mark.parametrize("varies", ["nowhere", "along one axis", "everywhere"])
def test_an_array_of_thresholds_reads_the_same_bits_as_a_scalar(shape, varies, getkey):
    key = getkey()
    thresholds = bits.threshold(jax.random.uniform(getkey(), shape))
    if varies == "nowhere":
        thresholds = jnp.full((1,) * len(shape), bits.threshold(0.3))
    elif varies == "along one axis":
        axis = len(shape) // 2
        thresholds = thresholds[tuple(slice(None if a == axis else 1) for a in range(len(shape)))]
    mask = bits.draw_mask(key, shape, thresholds, None)
    expected = mask_in_numpy(key, shape, 16, np.broadcast_to(thresholds, shape).ravel())
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 8), (2, 197, 5), (3, 7, 9, 5), (2, 64, 5), (2, 1100, 3), (0, 5)], ids=str
)
def test_a_program_for_a_tpu_reads_the_same_bits(shape, differentiated, getkey):
    """It selects or stores where other programs split the rows. Here it runs on the CPU."""

    def run_as_on_a_tpu(*inputs, tpu=None, cpu=None, default):
        return (tpu or default)(*inputs)

    key, threshold = getkey(), bits.threshold(0.1)
    expected = bits.draw_mask(jax.random.clone(key), shape, threshold, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", run_as_on_a_tpu)
        # The new function is not in the cache of `jit`.
        draw = bits._draw_decisions.__wrapped__
        mask = draw(key, None, shape, int(threshold), differentiated, None)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("shape", [(768,), (5, 128), (3, 2, 50)], ids=str)
def test_a_mask_with_fewer_rows_than_a_word_reads_no_others(shape):
    """Else a vmapped mask of one axis would fill the memory of 32 rows in programs for a TPU."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda key: bits.draw_mask(key, shape, bits.threshold(0.1), None))(key)
    sizes = [
        math.prod(map(int, sizes.split(",")))
        for sizes in re.findall(r":bool\[([\d,]+)\]", str(jaxpr))
    ]
    assert max(sizes) == math.prod(shape)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("shape", [(64, 40), (2, 197, 5), (2, 1100, 3), (9000,)], ids=str)
def test_a_mask_is_lowered_for_every_platform(shape, platform):
    key = jax.eval_shape(lambda: jax.random.key(0))
    draw = jax.jit(lambda key: bits.draw_mask(key, shape, bits.threshold(0.1), None))
    assert export.export(draw, platforms=[platform])(key).platforms == (platform,)


@pytest.mark.parametrize("num_bits", EXACT_IN)
@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_draw_a_random_word_for_32_rows_and_each_bit(num_bits, impl):
    key, threshold = jax.random.key(0, impl=impl), bits.threshold(EXACT_IN[num_bits])
    jaxpr = jax.make_jaxpr(lambda key: bits.draw_mask(key, (640, 128), threshold, None))(key)
    assert re.findall(r"random_bits\[[^]]*shape=\(([^)]*)\)", str(jaxpr)) == [
        f"{num_bits}, 20, 128"
    ]


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_masks_of_other_generators_have_the_probability_of_the_threshold(rate):
    key = jax.random.key(0, impl="rbg")
    kept = int(bits.draw_mask(key, (1000, 1000), bits.threshold(rate), None).sum())
    low, high = binomial_bounds(1000 * 1000, probability(rate))
    assert low <= kept <= high, f"kept {kept}, expected {low} to {high}"


@pytest.mark.parametrize("low", [0.1, 0.3])
def test_a_higher_rate_drops_all_that_a_lower_rate_drops(low, getkey):
    key = getkey()
    kept_at_low = bits.draw_mask(key, (1000,), bits.threshold(jnp.float32(low)), None)
    again = jax.random.clone(key)
    kept_at_high = bits.draw_mask(again, (1000,), bits.threshold(jnp.float32(low + 0.2)), None)
    assert not (kept_at_high & ~kept_at_low).any()
