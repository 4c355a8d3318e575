"""The distribution of masks."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import binomial_bounds, chi_square_bounds, mean_bound
from dropouts import RATES, kept_probability

import jdrop

pytestmark = pytest.mark.grid


# All rates in the coarsest dtype suffice, since mask and scale do not depend on the dtype.
@pytest.mark.parametrize(
    ("rate", "dtype"),
    [*((rate, "bfloat16") for rate in (0.05, 0.1, 0.15, 0.25, 0.3, 0.5, 0.7, 0.9, 0.95)),
     *itertools.product((0.1, 0.3, 0.9), ("float16", "float32"))],
)  # fmt: skip
def test_the_output_has_the_mean_of_the_input_and_the_expected_variance(rate, dtype, getkey):
    # Inputs spread over [1, 2], since a single value would be rounded with a bias of its own.
    x = jax.random.uniform(getkey(), (2**20,), minval=1, maxval=2).astype(dtype)
    y = np.asarray(jdrop.dropout(getkey(), x, rate), np.float64)
    x = np.asarray(x, np.float64)
    q = float(kept_probability(rate))
    p = 1 - q

    bound = mean_bound(p / q * np.mean(x**2), x.size)
    assert abs(y.mean() - x.mean()) < bound, f"mean {y.mean()}, expected {x.mean()} +- {bound}"

    squares, expected = np.mean((y - x) ** 2), p / q * np.mean(x**2)
    # (y - x)^2 is x^2 (p/q)^2 with probability q and x^2 with probability p.
    spread = np.mean(x**4) * p * q * (1 - (p / q) ** 2) ** 2
    # Rounding to 8 bits adds the second term. At rate 0.5 there is neither spread nor rounding.
    bound = mean_bound(spread, x.size) + 2**-8 * expected
    assert abs(squares - expected) <= bound, f"{squares}, expected {expected} +- {bound}"


@pytest.mark.parametrize("rate", [*RATES, *np.linspace(0.15, 0.85, 8).round(2), 1 - 1e-6])
def test_the_kept_fraction_is_the_realised_probability(rate, getkey):
    n = 2**20
    kept = int(jdrop.keep_mask(getkey(), (1024, 1024), float(rate)).sum())
    low, high = binomial_bounds(n, float(kept_probability(float(rate))))
    assert low <= kept <= high, f"kept {kept} of {n}, expected {low} to {high}"


def assert_uncorrelated(a: np.ndarray, b: np.ndarray, q: float, what: Any) -> None:
    actual = np.mean((a - q) * (b - q))
    bound = mean_bound((q * (1 - q)) ** 2, a.size)
    assert abs(actual) < bound, f"{what}: covariance {actual}, expected 0 +- {bound}"


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", [(512, 512), (511, 513), (2**18,), (2**12, 8, 8)])
def test_elements_are_independent_of_their_neighbours_near_and_far(rate, shape, getkey):
    """At lags that are powers of 2, a generator that splits words may repeat itself."""
    mask = np.asarray(jdrop.keep_mask(getkey(), shape, rate)).astype(float)
    q = float(kept_probability(rate))
    flat = mask.ravel()
    for lag in itertools.takewhile(lambda lag: lag <= flat.size // 2, (2**i for i in range(30))):
        assert_uncorrelated(flat[lag:], flat[:-lag], q, f"lag {lag}")
    for divisor in (2, 3, 4, 8, 16):
        lag = flat.size // divisor
        assert_uncorrelated(flat[lag:], flat[:-lag], q, f"lag 1/{divisor}")
    for axis in range(mask.ndim):
        ahead, behind = np.split(mask, [1], axis)[1], np.split(mask, [-1], axis)[0]
        assert_uncorrelated(ahead, behind, q, f"axis {axis}")


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("axis", [0, 1])
def test_counts_of_rows_and_columns_have_the_binomial_variance(rate, axis, getkey):
    mask = np.asarray(jdrop.keep_mask(getkey(), (512, 512), rate))
    q = float(kept_probability(rate))
    counts = mask.sum(axis=axis)
    statistic = np.sum((counts - 512 * q) ** 2) / (512 * q * (1 - q))
    low, high = chi_square_bounds(512)
    assert low < statistic < high, f"chi-square {statistic}, expected {low} to {high}"


@pytest.mark.parametrize("rate", RATES)
def test_the_patterns_of_four_elements_have_their_frequencies(rate, getkey):
    """If four elements share a word, pairs alone may not show a fault."""
    mask = np.asarray(jdrop.keep_mask(getkey(), (2**18, 4), rate))
    q = float(kept_probability(rate))
    patterns = np.array(list(itertools.product([0, 1], repeat=4)))
    expected = len(mask) * np.where(patterns, q, 1 - q).prod(axis=1)
    observed = np.bincount(mask @ np.array([8, 4, 2, 1]), minlength=16)
    rare = expected < 20
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    statistic = np.sum((observed - expected) ** 2 / expected)
    low, high = chi_square_bounds(len(expected) - 1)
    assert low < statistic < high, f"chi-square {statistic}: {observed}, expected {expected}"


@pytest.mark.parametrize("rate", [0.5, 0.3])
@pytest.mark.parametrize("make_keys", ["split", "fold_in", "seeds"])
def test_masks_of_different_keys_are_independent_at_each_element_and_pair(rate, make_keys, getkey):
    n, num_elements = 2**14, 64
    keys = {
        "split": lambda: jax.random.split(getkey(), n),
        "fold_in": lambda: jax.vmap(jax.random.fold_in, (None, 0))(getkey(), jnp.arange(n)),
        "seeds": lambda: jax.vmap(jax.random.key)(jnp.arange(n)),
    }[make_keys]()
    masks = np.asarray(
        jax.jit(jax.vmap(lambda key: jdrop.keep_mask(key, (num_elements,), rate)))(keys)
    )
    q = float(kept_probability(rate))
    deviations = (masks - q) / math.sqrt(q * (1 - q))
    assert np.abs(deviations.mean(axis=0)).max() < mean_bound(1, n)
    covariances = deviations.T @ deviations / n - np.diag((deviations**2).mean(axis=0))
    assert np.abs(covariances).max() < mean_bound(1, n)
    between_keys = deviations[1:].T @ deviations[:-1] / (n - 1)
    assert np.abs(between_keys).max() < mean_bound(1, n - 1)
