"""Stochastic depth: the functions of a key."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import binomial_bounds

import jdrop
from jdrop.stochastic_depth import draw_fixed_count_mask

pytestmark = pytest.mark.grid

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 3)) + 10, jnp.float32)


def branch(x):
    return 3 * x + 1


@pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 4, 3)])
@pytest.mark.parametrize("rate", [0.1, 0.5, np.float32(0.3)])
def test_drop_path_is_dropout_along_the_batch_axis_alone(shape, rate, getkey):
    key, x = getkey(), jnp.full(shape, 3.0)
    dims = range(1, len(shape))
    expected = jdrop.dropout(jax.random.clone(key), x, rate, broadcast_dims=dims)
    np.testing.assert_array_equal(jdrop.drop_path(key, x, rate), expected)


def test_without_per_sample_one_decision_holds_for_the_batch(getkey):
    keys = jax.random.split(getkey(), 64)
    drop = jax.vmap(lambda key: jdrop.drop_path(key, X, 0.5, per_sample=False))
    dropped = (drop(keys) == 0).reshape(64, -1)
    assert (dropped.all(1) | ~dropped.any(1)).all()
    assert 0 < dropped.all(1).sum() < 64


@pytest.mark.parametrize("rate", [0.25, 0.8125])
@pytest.mark.parametrize("scale", [True, False])
def test_the_mean_over_all_masks_is_the_branch(rate, scale):
    """Weighted by their probabilities; both rates are exact in 16 bits."""
    mean = np.zeros((3, 2))
    x = jnp.arange(1.0, 7.0).reshape(3, 2)
    for kept in itertools.product([False, True], repeat=3):
        probability = math.prod(1 - rate if k else rate for k in kept)
        mask = jnp.array(kept)[:, None]
        mean += probability * np.asarray(jdrop.apply_mask(mask, x, rate, scale=scale))
    np.testing.assert_allclose(mean, x * (1 if scale else 1 - rate), rtol=1e-6)


def test_samples_are_dropped_independently_and_as_often_as_the_rate_says(getkey):
    keys, rate = jax.random.split(getkey(), 20_000), 0.3
    kept = jax.vmap(lambda key: jdrop.drop_path(key, jnp.ones((3, 2)), rate))(keys)[..., 0] > 0
    patterns = np.asarray(kept) @ np.array([4, 2, 1])
    counts = np.bincount(patterns, minlength=8)
    for pattern, count in enumerate(counts):
        num_kept = bin(pattern).count("1")
        probability = (1 - rate) ** num_kept * rate ** (3 - num_kept)
        low, high = binomial_bounds(len(keys), probability, checks=8)
        assert low <= count <= high


@pytest.mark.parametrize("drop", ["path", "branch"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_rate_0_returns_everything_and_draws_nothing(drop, per_sample, getkey):
    def run(key, x):
        if drop == "path":
            return jdrop.drop_path(key, branch(x), 0, per_sample=per_sample)
        return jdrop.drop_branch(key, branch, x, 0.0, per_sample=per_sample)

    np.testing.assert_array_equal(run(getkey(), X), branch(X))
    program = jax.make_jaxpr(run)(getkey(), X)
    assert len(program.eqns) == len(jax.make_jaxpr(branch)(X).eqns)


@pytest.mark.parametrize("whole_batch", ["path", "branch"])
def test_a_traced_rate_compiles_once_and_out_of_range_is_nan(whole_batch, getkey):
    traces = []

    @jax.jit
    def run(key, rate):
        traces.append(rate)
        if whole_batch == "branch":
            return jdrop.drop_branch(key, branch, X, rate, per_sample=False)
        return jdrop.drop_path(key, branch(X), rate)

    for rate in (0.0, 0.5, 1.0):
        y = run(getkey(), rate)
        scaled = branch(X) / (1 - rate) if rate < 1 else jnp.zeros_like(X)
        assert jnp.all((y == 0) | jnp.isclose(y, scaled, rtol=1e-5))
    assert jnp.isnan(run(getkey(), 1.5)).all()
    assert len(traces) <= 1 + (whole_batch == "branch")


def test_the_gradient_is_that_of_the_kept_samples(getkey):
    key = getkey()
    y, pull = jax.vjp(lambda x: jdrop.drop_path(key, branch(x), 0.5), X)
    expected = jnp.where(y == 0, 0, 3 / 0.5)
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0], expected)


# `drop_branch`, for each sample.


def masked_branch(key, x, rate, **options):
    """What `drop_branch` returns, from the branch of all samples."""
    mask = draw_fixed_count_mask(key, (len(x), *[1] * (x.ndim - 1)), rate)
    return jdrop.apply_mask(mask, branch(x), rate, **options)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(("rate", "computed"), [(0.1, 8), (0.25, 6), (0.3, 6), (0.5, 4), (0.9, 1)])
def test_the_branch_computes_the_kept_samples_alone(rate, computed, scale, getkey):
    key, sizes = getkey(), []

    def counting(x):
        sizes.append(len(x))
        return branch(x)

    y = jdrop.drop_branch(key, counting, X, rate, scale=scale)
    assert sizes == [computed]
    expected = masked_branch(jax.random.clone(key), X, rate, scale=scale)
    np.testing.assert_array_equal(y, expected)
    assert computed - 1 <= (y != 0).any((1, 2)).sum() <= computed


def test_each_set_of_samples_is_as_probable_as_it_must_be_for_the_mean(getkey):
    """Of 3 samples at rate 1/2, 1 or 2 are kept; each of these 6 sets has probability 1/6."""
    keys = jax.random.split(getkey(), 12_000)
    masks = jax.vmap(lambda key: draw_fixed_count_mask(key, (3,), 0.5))(keys)
    counts = np.bincount(np.asarray(masks) @ np.array([4, 2, 1]), minlength=8)
    low, high = binomial_bounds(len(keys), 1 / 6, checks=6)
    assert counts[0] == counts[7] == 0
    assert all(low <= count <= high for count in counts[1:7])
    # With these probabilities, the mean over masks is the branch.
    sets = [kept for kept in itertools.product([0, 1], repeat=3) if 0 < sum(kept) < 3]
    x = branch(X[:3, :, 0])
    outputs = [jdrop.apply_mask(jnp.array(kept)[:, None] == 1, x, 0.5) for kept in sets]
    np.testing.assert_allclose(np.mean(outputs, 0), x, rtol=1e-6)


@pytest.mark.parametrize(("batch", "rate"), [(1, 0.3), (4, 0.1), (5, 0.8), (8, 0.99)])
def test_each_sample_is_kept_with_the_probability_of_dropout(batch, rate, getkey):
    """Also if the batch is too small to drop that share of it."""
    keys = jax.random.split(getkey(), 10_000)
    kept = jax.vmap(lambda key: draw_fixed_count_mask(key, (batch,), rate))(keys).sum(0)
    low, high = binomial_bounds(len(keys), 1 - rate, checks=batch)
    assert ((low <= kept) & (kept <= high)).all()


def test_gradients_of_inputs_and_parameters_are_those_of_the_masked_branch(getkey):
    key, weight = getkey(), jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32)

    def skipped(weight, x):
        return jdrop.drop_branch(jax.random.clone(key), lambda x: jnp.sin(x @ weight), x, 0.5)

    def masked(weight, x):
        mask = draw_fixed_count_mask(jax.random.clone(key), (8, 1, 1), 0.5)
        return jdrop.apply_mask(mask, jnp.sin(x @ weight), 0.5)

    gradients = [
        jax.grad(lambda weight, x, f=f: (f(weight, x) ** 2).sum(), (0, 1))(weight, X)
        for f in (skipped, masked)
    ]
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-5), *gradients)


def test_dropped_samples_are_0_even_where_the_branch_is_not_finite(getkey):
    """At 0.1, 8 samples are computed, and the last of them may be dropped after that."""
    keys = jax.random.split(getkey(), 20)
    y = jax.vmap(lambda key: jdrop.drop_branch(key, lambda x: x * jnp.inf, X, 0.1))(keys)
    assert ((y == 0) | jnp.isinf(y)).all()
    assert (y == 0).any()


def test_vmap_over_keys_equals_a_loop(getkey):
    keys = jax.random.split(getkey(), 5)
    drop = jax.jit(lambda key: jdrop.drop_branch(key, branch, X, 0.3))
    np.testing.assert_array_equal(jax.vmap(drop)(keys), jnp.stack([drop(key) for key in keys]))


def test_arrays_that_belong_to_samples_go_with_them(getkey):
    """For instance the padding masks of sentences."""
    x, y = jnp.arange(1.0, 9.0), jnp.arange(1, 9)
    key = getkey()
    out = jdrop.drop_branch(key, lambda pair: pair["x"] * pair["y"], {"x": x, "y": y}, 0.5)
    kept = draw_fixed_count_mask(jax.random.clone(key), (8,), 0.5)
    np.testing.assert_array_equal(out, jnp.where(kept, 2 * x * x, 0))


# `drop_branch`, for the batch.


def test_for_a_batch_it_equals_drop_path_and_skips_the_branch(getkey):
    calls = []

    def counting(x):
        jax.debug.callback(lambda: calls.append(1))
        return branch(x)

    run = jax.jit(lambda key: jdrop.drop_branch(key, counting, X, 0.5, per_sample=False))
    num_kept = 0
    for key in jax.random.split(getkey(), 12):
        y = run(key)
        masked = jdrop.drop_path(jax.random.clone(key), branch(X), 0.5, per_sample=False)
        np.testing.assert_array_equal(y, masked)
        num_kept += int((y != 0).any())
    jax.effects_barrier()
    assert 0 < num_kept < 12
    assert len(calls) == num_kept


def test_layers_of_a_scan_are_dropped_each_by_a_key_of_its_own(getkey):
    """LayerDrop over a stack: layer l adds 4**l, so the digits of the result tell what was kept."""
    key, powers = getkey(), 4.0 ** jnp.arange(8)

    def stack(keys):
        def layer(x, power_and_key):
            power, key = power_and_key
            add = jdrop.drop_branch(
                key, lambda x: jnp.full_like(x, power), x, 0.5, per_sample=False, scale=False
            )
            return x + add, None

        return jax.lax.scan(layer, jnp.zeros((2, 1)), (powers, keys))[0]

    keys = jax.random.split(key, 8)
    outputs = np.asarray(stack(keys))
    kept = [bool(jdrop.keep_mask(jax.random.clone(key), (1, 1), 0.5)) for key in keys]
    np.testing.assert_array_equal(outputs, np.full((2, 1), np.asarray(powers)[kept].sum()))
    assert 0 < sum(kept) < 8


# Rates, and arguments that are refused.


def test_linear_rates_reach_from_0_to_the_rate():
    assert jdrop.depth_linear_rates(0.3, 1) == (0.3,)
    assert jdrop.depth_linear_rates(0.3, 4) == (0.0, 0.3 * (1 / 3), 0.3 * (2 / 3), 0.3)
    # The paper's equation 4, in rates: l / L times the last.
    paper = [0.5 * layer / 5 for layer in range(1, 6)]
    np.testing.assert_allclose(jdrop.depth_linear_rates(0.5, 6)[1:], paper)
    assert all(type(rate) is float for rate in jdrop.depth_linear_rates(np.float32(0.5), 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda key: jdrop.drop_path(key, jnp.ones(()), 0.5), ValueError, "batch axis"),
        (lambda key: jdrop.drop_path(key, X, 1.0), ValueError, r"rate must lie in \[0, 1\)"),
        (lambda key: jdrop.drop_path(key, X, jnp.full((3,), 0.5)), ValueError, "broadcastable"),
        (lambda key: jdrop.drop_path(key, jnp.arange(3), 0.5), TypeError, "float or complex"),
        (lambda key: jdrop.drop_branch(key, branch, X, jnp.array(0.5)), TypeError, "Python scalar"),
        (lambda key: jdrop.drop_branch(key, branch, 1.0, 0.5), ValueError, "same batch"),
        (lambda key: jdrop.drop_branch(key, branch, {}, 0.5), ValueError, "got no array"),
        (
            lambda key: jdrop.drop_branch(key, sum, (X, X[:3]), 0.5),
            ValueError, r"shapes \(8, 4, 3\), \(3, 4, 3\)",
        ),
        (lambda key: jdrop.drop_branch(key, jnp.sum, X, 0.5), ValueError, r"size 4, got the shape"),
        (
            lambda key: jdrop.drop_branch(key, branch, X, jnp.full(3, 0.5), per_sample=False),
            ValueError, "must be a scalar",
        ),
        (lambda key: jdrop.depth_linear_rates(1.0, 3), ValueError, "rate must lie"),
        (lambda key: jdrop.depth_linear_rates(jnp.array(0.5), 3), TypeError, "Python scalar"),
        (lambda key: jdrop.depth_linear_rates(0.5, 0), ValueError, "at least 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_arguments_raise(call, error, message, getkey):
    with pytest.raises(error, match=message):
        call(getkey())
