"""Statistical tests of masks: within a mask, between keys, and in a training run.

A fault of the generator would show along the layout in `bits.py`, so these tests look at the rows
of a word, at columns and at groups. `scripts/randomness.py` reads many more bits and ignores the
layout.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bounds import binomial_bounds, bounded_mean_bound, chi_square_bounds
from jax import Array
from scipy import stats

import jdrop
import jdrop.linen
from jdrop.bits import GROUP
from jdrop.ensemble import fit_ensemble, init_ensemble

pytestmark = pytest.mark.grid

EXACT_IN = {1: 0.5, 2: 0.25, 4: 1 / 16, 8: 77 / 256, 15: 0.1, 16: 0.3}
"""For each number of bits, a rate that draws so many."""

COLUMNS = 256
"""Columns of most masks."""

every_number_of_bits = pytest.mark.parametrize("num_bits", EXACT_IN)


def kept_probability(num_bits: int) -> float:
    return round((1 - EXACT_IN[num_bits]) * 2**16) / 2**16


@partial(jax.jit, static_argnames=("shape", "rate"))
def draw(keys: Array, shape: tuple[int, ...], rate: float) -> Array:
    return jax.vmap(lambda key: jdrop.keep_mask(key, shape, rate))(keys)


def draw_masks(keys: Array, shape: tuple[int, ...], num_bits: int) -> np.ndarray:
    """Draws a mask from each key."""
    return np.asarray(draw(keys, shape, EXACT_IN[num_bits]))


def draw_groups(key: Array, num_bits: int) -> np.ndarray:
    """Draws a mask of 2**21 elements, as `[group, row of the group, column]`."""
    mask = draw_masks(key[None], (2**21 // COLUMNS, COLUMNS), num_bits)
    return mask.reshape(-1, GROUP, COLUMNS)


def standardised(masks: np.ndarray, q: float) -> np.ndarray:
    """Keep decisions, shifted and scaled to mean 0 and variance 1."""
    return (masks.astype(np.float32) - np.float32(q)) / np.float32(math.sqrt(q * (1 - q)))


def correlation_bound(q: float, n: int, checks: int) -> float:
    """The bound for the mean of `n` products of two standardised decisions."""
    # A product is farthest from 0 if both decisions are the rarer one.
    return bounded_mean_bound(1, max(q / (1 - q), (1 - q) / q), n, checks)


def assert_uncorrelated(rows: np.ndarray, q: float) -> None:
    """Checks the correlation of every two rows of decisions."""
    count, n = rows.shape
    values = standardised(rows, q)
    correlations = np.triu(values @ values.T / n, 1)
    bound = correlation_bound(q, n, count * (count - 1) // 2)
    worst = np.unravel_index(np.abs(correlations).argmax(), correlations.shape)
    assert abs(correlations[worst]) < bound, (
        f"rows {worst[0]} and {worst[1]}: correlation {correlations[worst]}, expected 0 +- {bound}"
    )


def assert_frequencies(values: np.ndarray, probabilities: np.ndarray) -> None:
    """Checks the chi-square of the frequencies of values; rare values are merged."""
    observed = np.bincount(values, minlength=len(probabilities))
    expected = values.size * probabilities
    rare = expected < 20
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    statistic = np.sum((observed - expected) ** 2 / expected)
    low, high = chi_square_bounds(len(expected) - 1)
    assert low < statistic < high, f"chi-square {statistic}, expected {low} to {high}"


def assert_counts(kept: np.ndarray, n: int, q: float, what: str) -> None:
    """Checks counts of kept among `n` decisions: each, their sum, and their chi-square."""
    low, high = binomial_bounds(n * kept.size, q)
    assert low <= kept.sum() <= high, f"kept {kept.sum()}, expected {low} to {high}"
    low, high = binomial_bounds(n, q, kept.size)
    assert low <= kept.min(), f"{what} {kept.argmin()}: kept {kept.min()} of {n}, at least {low}"
    assert kept.max() <= high, f"{what} {kept.argmax()}: kept {kept.max()} of {n}, at most {high}"
    statistic = np.sum((kept - n * q) ** 2) / (n * q * (1 - q))
    low, high = chi_square_bounds(kept.size)
    assert low < statistic < high, f"{what}s: chi-square {statistic}, expected {low} to {high}"


# Within a mask.


@every_number_of_bits
@pytest.mark.parametrize("shape", [(GROUP, COLUMNS), (50, 256), (3, 5, 257)], ids=str)
def test_each_element_is_kept_at_the_rate(num_bits, shape, getkey):
    q = kept_probability(num_bits)
    masks = draw_masks(jax.random.split(getkey(), 1024), shape, num_bits)
    kept = masks.sum(axis=0)
    assert_counts(kept.ravel(), len(masks), q, "element")
    if shape == (GROUP, COLUMNS):
        assert_counts(kept.sum(axis=1), len(masks) * COLUMNS, q, "row")
        assert_counts(kept.sum(axis=0), len(masks) * GROUP, q, "column")


WORDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "last axis": lambda mask: mask,
    "first axis": lambda mask: mask.T,
    "rows of a group": lambda mask: mask.reshape(-1, GROUP, mask.shape[1]).swapaxes(1, 2),
}
"""Arrays whose last axis is cut into words of 8 decisions."""


@every_number_of_bits
@pytest.mark.parametrize("along", WORDS)
@pytest.mark.parametrize("shape", [(1024, 2048), (256, 8192)], ids=str)
def test_words_of_eight_decisions_have_their_frequencies(num_bits, along, shape, getkey):
    mask = draw_masks(getkey()[None], shape, num_bits)[0]
    words = np.packbits(WORDS[along](mask).reshape(-1, 8))
    kept, q = np.bitwise_count(np.arange(256, dtype=np.uint8)), kept_probability(num_bits)
    assert_frequencies(words, q**kept * (1 - q) ** (8.0 - kept))


@every_number_of_bits
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["groups", "rows of a group", "columns"])
def test_every_two_groups_rows_and_columns_are_uncorrelated(num_bits, axis, getkey):
    decisions = np.moveaxis(draw_groups(getkey(), num_bits), axis, 0)
    assert_uncorrelated(decisions.reshape(len(decisions), -1), kept_probability(num_bits))


@every_number_of_bits
@pytest.mark.parametrize("part_rows", [4, 8, 16])
def test_parts_of_a_word_are_independent_and_keep_binomial_counts(num_bits, part_rows, getkey):
    decisions = draw_groups(getkey(), num_bits)
    counts = decisions.reshape(len(decisions), -1, part_rows, COLUMNS).sum(axis=2)
    binomial = stats.binom.pmf(np.arange(part_rows + 1), part_rows, kept_probability(num_bits))
    joint = (part_rows + 1) * counts[:, :-1] + counts[:, 1:]
    # Every other pair of neighbours, so that no part is counted twice.
    assert_frequencies(joint[:, ::2].ravel(), np.outer(binomial, binomial).ravel())


LAGS_ALONG = [((300, 5, 700), 0), ((300, 5, 700), 2), ((20000, 3, 7), 0), ((3, 41, 9000), 2)]


@every_number_of_bits
@pytest.mark.parametrize(("shape", "axis"), LAGS_ALONG, ids=str)
def test_decisions_are_uncorrelated_at_the_lags_of_the_layout(num_bits, shape, axis, getkey):
    q = kept_probability(num_bits)
    mask = draw_masks(getkey()[None], shape, num_bits)[0]
    values = np.moveaxis(standardised(mask, q), axis, -1)
    for lag in [1, 2, 4, 8, 16, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP, 128, 256]:
        if lag >= shape[axis]:
            continue
        actual = np.mean(values[..., lag:] * values[..., :-lag])
        n = mask.size // shape[axis] * (shape[axis] - lag)
        bound = correlation_bound(q, n, checks=1)
        assert abs(actual) < bound, f"lag {lag}: correlation {actual}, expected 0 +- {bound}"


# From key to key.


# The key is used again after its children here, to check that even then no mask repeats.
@jax.debug_key_reuse(False)
def relatives(parent: Array) -> Array:
    """A key, its parent, siblings, children and grandchildren."""
    key, *siblings = jax.random.split(parent, 4)
    children = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))
    grandchildren = jax.vmap(lambda child: jax.random.split(child, 4))(children)
    near = jnp.stack([parent, key, *siblings])
    return jnp.concatenate([near, children, grandchildren.ravel()])


KEYS: dict[str, Callable[[Array], Array]] = {
    "split": lambda key: jax.random.split(key, 32),
    "fold_in": lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(32)),
    "seeds": lambda _: jax.vmap(jax.random.key)(jnp.arange(32)),
    "relatives": relatives,
}


@every_number_of_bits
@pytest.mark.parametrize("make_keys", KEYS)
def test_masks_of_different_keys_are_uncorrelated(num_bits, make_keys, getkey):
    """At different elements too: the counters of a key must not continue those of another."""
    keys = KEYS[make_keys](getkey())
    q = kept_probability(num_bits)
    masks = draw_masks(keys, (4 * GROUP, COLUMNS), num_bits)
    assert_uncorrelated(masks.reshape(len(keys), -1), q)
    assert_uncorrelated(masks.reshape(4 * len(keys), -1), q)
    runs = np.packbits(masks.reshape(-1, COLUMNS), axis=1)
    repeats = len(runs) - len(np.unique(runs, axis=0))
    _, most = binomial_bounds(math.comb(len(runs), 2), (q**2 + (1 - q) ** 2) ** COLUMNS)
    assert repeats <= most, f"{repeats} of {len(runs)} runs occur again, at most {most}"


# In a training run.

MEMBERS, EPOCHS, STEPS, BATCH, UNITS = 6, 2, 8, 16, 256


class Recording(nn.Module):
    """A network with two dropout layers that records in its variables the units kept."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        step = self.variable("record", "step", jnp.zeros, (), jnp.int32)
        shape = EPOCHS * STEPS, 2, BATCH, UNITS
        kept = self.variable("record", "kept", jnp.zeros, shape, bool)
        for site in range(2):
            # Units are above 0, so that a 0 is a dropped unit.
            x = 1 + nn.sigmoid(nn.Dense(UNITS)(x))
            x = jdrop.linen.Dropout(self.rate, deterministic=not train)(x)
            if train:
                kept.value = kept.value.at[step.value, site].set(x != 0)
        if train:
            step.value += 1
        return nn.Dense(2)(x)


@pytest.mark.parametrize("num_bits", [1, 2, 16])
def test_masks_of_members_steps_and_sites_are_uncorrelated(num_bits, getkey):
    network = jdrop.linen.as_network(Recording(EXACT_IN[num_bits]))
    inputs = jax.random.normal(getkey(), (STEPS * BATCH, 4))
    labels = jnp.arange(STEPS * BATCH) % 2
    state = init_ensemble(getkey(), network, optax.sgd(0.1), inputs[:BATCH], ensemble_size=MEMBERS)
    state, _ = fit_ensemble(getkey(), state, inputs, labels, num_epochs=EPOCHS, batch_size=BATCH)
    record = state.variables["record"]
    np.testing.assert_array_equal(record["step"], EPOCHS * STEPS)
    masks = np.asarray(record["kept"]).reshape(MEMBERS * EPOCHS * STEPS * 2, BATCH * UNITS)
    q = kept_probability(num_bits)
    assert_counts(masks.sum(axis=1), BATCH * UNITS, q, "mask")
    assert_uncorrelated(masks, q)
    # The examples of a batch do not share masks either.
    assert_uncorrelated(np.moveaxis(masks.reshape(-1, BATCH, UNITS), 1, 0).reshape(BATCH, -1), q)
