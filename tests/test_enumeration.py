import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import chi_square_bounds
from networks import softmax_regression
from scipy import special, stats

import jdrop
import jdrop.linen
from jdrop.inference import enumerate_masks, monte_carlo
from jdrop.network import predict, replay_masks

# Exact in 16 bits, so that the probabilities that the random bits realise are these.
RATES = {"inputs": np.array([0.5, 0.25]), "hidden": np.array([0.8125, 0.5, 0.125, 0.375])}
INPUTS = np.random.default_rng(0).normal(size=(5, 2))
KERNELS = {
    "hidden": 2 * np.random.default_rng(1).normal(size=(2, 4)),
    "outputs": np.random.default_rng(2).normal(size=(4, 3)),
}


def two_layers(kernels, inputs, rates, activation=jax.nn.relu):
    def log_probs_fn(masks):
        x = jdrop.apply_mask(masks["inputs"], inputs, rates["inputs"])
        x = activation(x @ kernels["hidden"])
        x = jdrop.apply_mask(masks["hidden"], x, rates["hidden"])
        return jax.nn.log_softmax(x @ kernels["outputs"])

    return log_probs_fn


@jax.jit
def enumerated_layers(kernels):
    return enumerate_masks(two_layers(kernels, jnp.float32(INPUTS), RATES), RATES)


def float32(tree):
    return jax.tree.map(jnp.float32, tree)


def averages_in_float64(kernels, rates):
    """A loop over all masks of the two layers with ReLUs, in double precision."""
    keep_probs = np.concatenate([1 - rates["inputs"], 1 - rates["hidden"]])
    mean, mean_log, total = 0, 0, 0
    for mask in itertools.product([0, 1], repeat=6):
        probability = math.prod(
            keep_prob if kept else 1 - keep_prob
            for kept, keep_prob in zip(mask, keep_probs, strict=True)
        )
        if probability == 0:
            continue
        scaled = np.array(mask) / keep_probs
        hidden = np.maximum((INPUTS * scaled[:2]) @ kernels["hidden"], 0) * scaled[2:]
        log_probs = special.log_softmax(hidden @ kernels["outputs"], -1)
        mean += probability * np.exp(log_probs)
        mean_log += probability * log_probs
        total += probability
    assert total == pytest.approx(1, abs=1e-12)
    return np.log(mean), special.log_softmax(mean_log, -1)


def assert_averages(got, expected):
    for average, in_float64 in zip(got, expected, strict=True):
        assert average.dtype == jnp.float32
        np.testing.assert_allclose(average, in_float64, rtol=3e-6, atol=3e-6)


# 64 masks: in one chunk, in as many, and in chunks of which the last is cut short.
@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [256, 1, 5])
def test_two_sites_with_a_rate_for_each_unit_equal_a_loop_over_all_masks(chunk_size):
    log_probs_fn = two_layers(float32(KERNELS), jnp.float32(INPUTS), RATES)
    got = enumerate_masks(log_probs_fn, RATES, chunk_size=chunk_size)
    assert_averages(got, averages_in_float64(KERNELS, RATES))


def test_units_that_are_never_or_always_dropped_are_enumerated_exactly():
    """Known rates of 0 and 1 halve the masks; traced ones have masks of probability 0 instead."""
    rates = {"inputs": np.array([0.0, 0.25]), "hidden": np.array([0.5, 0.0, 0.125, 0.0])}
    kernels, inputs = float32(KERNELS), jnp.float32(INPUTS)

    def enumerated(rates):
        return enumerate_masks(two_layers(kernels, inputs, rates), rates, chunk_size=5)

    expected = averages_in_float64(KERNELS, rates)
    assert_averages(enumerated(rates), expected)
    traced = jax.jit(jax.vmap(enumerated))
    dropped = {"inputs": rates["inputs"], "hidden": np.array([0.5, 0.0, 0.125, 1.0])}
    out_of_range = {"inputs": rates["inputs"], "hidden": np.array([0.5, 0.0, 0.125, 1.5])}
    every = [rates, dropped, out_of_range]
    stacked = float32(jax.tree.map(lambda *rates: np.stack(rates), *every))
    got = traced(stacked)
    assert_averages([average[0] for average in got], expected)
    without = KERNELS | {"outputs": KERNELS["outputs"] * np.array([[1], [1], [1], [0]])}
    expected = averages_in_float64(without, rates)
    assert_averages([average[1] for average in got], expected)
    assert_averages(enumerated(dropped), expected)
    assert all(np.isnan(average[2]).all() for average in got)


def test_many_units_of_which_few_are_random():
    rates = np.zeros(40)
    rates[[3, 17, 39]] = 0.25, 0.5, 0.75

    def log_probs_fn(masks):
        kept = masks["units"]
        others_kept = kept[jnp.array([unit for unit in range(40) if rates[unit] == 0])].all()
        logit = jnp.where(others_kept, kept[3] + 2.0 * kept[17] + 4.0 * kept[39], jnp.nan)
        return jax.nn.log_softmax(jnp.array([[logit, 0.0]]))

    logits = np.array([a + 2 * b + 4 * c for a, b, c in itertools.product([0, 1], repeat=3)])
    weights = np.array(
        [
            (0.75 if a else 0.25) * 0.5 * (0.25 if c else 0.75)
            for a, b, c in itertools.product([0, 1], repeat=3)
        ]
    )
    got = enumerate_masks(log_probs_fn, {"units": rates})
    assert jnp.exp(got.arithmetic[0, 0]) == pytest.approx(weights @ special.expit(logits), rel=1e-6)
    assert jnp.exp(got.geometric[0, 0]) == pytest.approx(special.expit(weights @ logits), rel=1e-6)


@pytest.mark.parametrize("rate", [0.3, 0.5])
def test_weight_scaling_is_the_geometric_average_of_softmax_regression(rate, getkey):
    """To the last digits, for a rate too that the random bits realise only nearly."""
    x, kernel = jax.random.normal(getkey(), (4, 10)), jax.random.normal(getkey(), (10, 3))

    def log_probs_fn(masks):
        return jax.nn.log_softmax(jdrop.apply_mask(masks["inputs"], x, rate) @ kernel)

    got = enumerate_masks(log_probs_fn, {"inputs": np.full(10, rate)})
    scaled = jax.nn.log_softmax(x @ kernel)
    np.testing.assert_allclose(got.geometric, scaled, rtol=2e-6, atol=2e-6)
    assert np.abs(got.arithmetic - scaled).max() > 0.1


@pytest.mark.slow
def test_the_gap_of_weight_scaling_is_that_of_the_nonlinearity():
    """Deep but linear, the logits of all masks average to those of weight scaling."""
    kernels, inputs = float32(KERNELS), jnp.float32(INPUTS)
    everything = {name: np.zeros_like(rates) for name, rates in RATES.items()}
    kept = {name: np.ones(rates.shape, bool) for name, rates in RATES.items()}
    gaps = {}
    for name, activation in {"linear": lambda x: x, "relu": jax.nn.relu}.items():
        scaled = two_layers(kernels, inputs, everything, activation)(kept)
        got = enumerate_masks(two_layers(kernels, inputs, RATES, activation), RATES)
        gaps[name] = np.abs(got.geometric - scaled).max()
        assert np.abs(got.geometric - got.arithmetic).max() > 0.1
    assert gaps["linear"] < 5e-6
    assert gaps["relu"] > 0.1


@pytest.mark.parametrize("num_samples", [100, 1600])
def test_monte_carlo_strays_from_the_average_by_the_square_root_of_its_samples(num_samples, getkey):
    """Over copies of one input, each with masks of its own; variances known from all masks."""
    rate, num_copies = 0.5, 1000
    network = softmax_regression(rate)
    x = jax.random.normal(getkey(), (1, 6))
    variables = network.init(getkey(), x)

    def log_probs_fn(masks):
        return jax.nn.log_softmax(
            network(variables, jdrop.apply_mask(masks["inputs"], x, rate), None)
        )

    rates = {"inputs": np.full(6, rate)}
    probs = np.exp(enumerate_masks(log_probs_fn, rates).arithmetic[0])
    # The average of the squares: of probabilities it need not be one.
    squares = np.exp(enumerate_masks(lambda masks: 2 * log_probs_fn(masks), rates).arithmetic[0])
    sampled = monte_carlo(
        getkey(), network, variables, jnp.tile(x, (num_copies, 1)), num_samples=num_samples
    )
    errors = np.exp(np.asarray(sampled, np.float64)) - probs
    low, high = chi_square_bounds(num_copies)
    statistics = num_samples * (errors**2).sum(0) / (squares - probs**2)
    assert ((low < statistics) & (statistics < high)).all()


def test_a_million_masks_lose_no_digits():
    """Against the binomial distribution of how many of 20 units are kept."""
    rate, units = 0.3125, 20

    def log_probs_fn(masks):
        kept = masks["units"].sum().astype(jnp.float32)
        return jax.nn.log_softmax(jnp.array([[kept - 13, 0.0]]))

    got = jax.jit(lambda: enumerate_masks(log_probs_fn, {"units": np.full(units, rate)}))()
    kept = np.arange(units + 1)
    weights = stats.binom.pmf(kept, units, 1 - rate)
    logits = np.stack([kept - 13, np.zeros(units + 1)], -1)
    expected = weights @ special.softmax(logits, -1)
    np.testing.assert_allclose(np.exp(got.arithmetic[0]), expected, rtol=2e-6)
    expected = special.softmax(weights @ logits)
    np.testing.assert_allclose(np.exp(got.geometric[0]), expected, rtol=2e-6)


def test_networks_are_enumerated_together_as_one_by_one():
    several = [KERNELS, {name: -kernel for name, kernel in KERNELS.items()}]
    stacked = jax.tree.map(lambda *kernels: jnp.stack(kernels), *float32(several))
    together = jax.vmap(enumerated_layers)(stacked)
    for index, kernels in enumerate(several):
        alone = enumerated_layers(float32(kernels))
        assert_averages([average[index] for average in together], alone)
        assert_averages(alone, averages_in_float64(kernels, RATES))


def test_replayed_masks_thin_a_linen_module():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = jdrop.linen.Dropout(0.5, deterministic=not train, name="inputs")(x)
            x = nn.relu(nn.Dense(4, use_bias=False)(x))
            x = jdrop.linen.Dropout(0.25, deterministic=not train, name="hidden")(x)
            return nn.Dense(3, use_bias=False)(x)

    params = {
        "Dense_0": {"kernel": jnp.float32(KERNELS["hidden"])},
        "Dense_1": {"kernel": jnp.float32(KERNELS["outputs"])},
    }

    network = jdrop.linen.as_network(MLP())

    def log_probs_fn(masks):
        thinned = replay_masks(network, {name: (mask,) for name, mask in masks.items()})
        return predict(None, thinned, {"params": params}, jnp.float32(INPUTS))

    rates = {"inputs": np.full(2, 0.5), "hidden": np.full(4, 0.25)}
    assert_averages(enumerate_masks(log_probs_fn, rates), averages_in_float64(KERNELS, rates))


def test_what_masks_rule_out_and_what_is_too_unlikely_for_a_plain_average():
    """Of two masks, one rules out the second class, and neither allows the third."""
    rows = jnp.log(jnp.array([[[0.5, 0.5, 0.0]], [[1.0, 0.0, 0.0]]]))
    rates = {"unit": np.array([0.5])}
    got = enumerate_masks(lambda masks: rows[masks["unit"][0].astype(int)], rates)
    np.testing.assert_allclose(jnp.exp(got.arithmetic), [[0.75, 0.25, 0]], rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(got.geometric), [[1, 0, 0]], rtol=1e-6)
    rows = jnp.array([[[0.0, -2000.0]], [[0.0, -1000.0]]])
    got = enumerate_masks(lambda masks: rows[masks["unit"][0].astype(int)], rates)
    np.testing.assert_allclose(got.arithmetic, [[0, -1000 - math.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(got.geometric, [[0, -1500]], rtol=1e-6)


def test_traced_rates_at_and_beyond_the_ends_of_their_range():
    """What a mask of probability 0 predicts does not count; a rate out of range gives NaN."""

    def enumerated(rates, impossible):
        rows = jnp.stack([jnp.full((1, 2), impossible), jnp.array([[-2000.0, -1000.0]])])
        return enumerate_masks(
            lambda masks: rows[masks["units"][0].astype(int)], {"units": rates}, chunk_size=3
        )

    rates = jnp.array([[0.0, 0.5], [0.0, 0.5], [0.0, 0.5], [-0.1, 0.5], [0.0, 1.1]])
    impossible = jnp.array([math.nan, -math.inf, 0.0, 0.0, 0.0])
    got = jax.jit(jax.vmap(enumerated))(rates, impossible)
    for index in range(3):
        np.testing.assert_allclose(got.arithmetic[index], [[-2000, -1000]], rtol=1e-6)
        np.testing.assert_allclose(got.geometric[index], [[-1000, 0]], rtol=1e-6)
    assert all(np.isnan(average[3:]).all() for average in got)


def test_half_precision_is_averaged_in_float32():
    rows = jax.nn.log_softmax(jnp.array([[[2.0, 0.0]], [[0.0, 1.0]]])).astype(jnp.bfloat16)
    rates = {"units": np.full(10, 0.3)}
    got = enumerate_masks(lambda masks: rows[masks["units"][0].astype(int)], rates)
    mean = np.array([0.3, 0.7]) @ np.exp(np.float64(rows[:, 0]))
    assert got.arithmetic.dtype == got.geometric.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(got.arithmetic[0]), mean, rtol=1e-4)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"units": np.full(21, 0.5)}, "at most 20 units to chance.*got 21; sample"),
        ({"a": np.full(20, 0.5), "b": np.full(5, 0.5)}, "at most 20 units to chance.*got 25"),
        ({"units": 0.5}, r"got the shape \(\) for 'units'; give `jnp.full"),
        ({"units": np.full((2, 2), 0.5)}, r"got the shape \(2, 2\) for 'units'"),
        ({"units": np.array([0.5, 1.5])}, "lie in .0, 1., got an array that holds 1.5"),
        ({}, "must name at least 1 unit"),
    ],
)
def test_rates_that_cannot_be_enumerated_are_errors(rates, message):
    with pytest.raises(ValueError, match=message):
        enumerate_masks(lambda masks: jnp.zeros((1, 1)), rates)


def test_a_chunk_size_of_0_raises():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        enumerate_masks(lambda masks: jnp.zeros((1, 1)), RATES, chunk_size=0)
