import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, LinenMLP, NnxMLP, softmax_regression

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop.inference import POOLS, monte_carlo, pool, weight_scaling
from jdrop.network import Network, predict

pytestmark = pytest.mark.grid


def random_log_probs(key, *shape):
    return jax.nn.log_softmax(3 * jax.random.normal(key, shape))


def pooled_in_float64(log_probs, method):
    log_probs = np.asarray(log_probs, np.float64)
    mean = np.exp(log_probs).mean(0)
    if method == "arithmetic":
        return mean
    if method == "geometric":
        unnormalised = np.exp(log_probs.mean(0))
        return unnormalised / unnormalised.sum(-1, keepdims=True)
    votes = np.eye(log_probs.shape[-1])[log_probs.argmax(-1)].sum(0)
    return (votes + mean) / (len(log_probs) + 1)


@pytest.mark.parametrize("method", POOLS)
def test_pools_equal_their_definition_in_float64(getkey, method):
    log_probs = random_log_probs(getkey(), 5, 20, 4)
    got = jnp.exp(pool(log_probs, method))
    np.testing.assert_allclose(got, pooled_in_float64(log_probs, method), rtol=2e-5)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("method", ["arithmetic", "geometric"])
@pytest.mark.parametrize("copies", [1, 4])
def test_identical_members_pool_to_themselves(getkey, method, copies):
    member = random_log_probs(getkey(), 20, 4)
    np.testing.assert_allclose(
        pool(jnp.stack([member] * copies), method), member, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("method", POOLS)
def test_the_order_of_members_does_not_matter(getkey, method):
    log_probs = random_log_probs(getkey(), 6, 20, 4)
    np.testing.assert_allclose(pool(log_probs[::-1], method), pool(log_probs, method), rtol=1e-4)


def test_the_vote_is_the_majority_and_ties_go_to_the_arithmetic_average(getkey):
    """Over all ways in which five members vote for three classes, with random probabilities."""
    votes = np.array(list(itertools.product(range(3), repeat=5)))
    probs = np.array(jax.random.dirichlet(getkey(), jnp.ones(3), (5, len(votes))), np.float64)
    for member, example in np.ndindex(probs.shape[:2]):
        row = probs[member, example]
        top, voted = row.argmax(), votes[example, member]
        row[[top, voted]] = row[[voted, top]]
    got = np.asarray(pool(jnp.log(probs.astype(np.float32)), "vote")).argmax(-1)
    for example, row in enumerate(votes):
        counts = np.bincount(row, minlength=3)
        tied = np.flatnonzero(counts == counts.max())
        assert got[example] == tied[probs[:, example].mean(0)[tied].argmax()]


@pytest.mark.parametrize("method", POOLS)
def test_confident_members_stay_finite(method):
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
    pooled = pool(jax.nn.log_softmax(logits), method)
    assert np.isfinite(pooled).all()
    np.testing.assert_allclose(jnp.exp(pooled), [0.5, 0.5], rtol=1e-5)


def test_an_unknown_pooling_method_is_an_error(getkey):
    with pytest.raises(ValueError, match="must be one of arithmetic, geometric, vote, got 'mean'"):
        pool(random_log_probs(getkey(), 2, 3), "mean")


def all_masks(units):
    return jnp.array(list(itertools.product([False, True], repeat=units)))


def mask_weights(masks, rate):
    kept = masks.sum(1)
    return (1 - rate) ** kept * rate ** (masks.shape[1] - kept)


def test_weight_scaling_is_the_geometric_pool_of_all_masks_of_softmax_regression(getkey):
    """At the rate 1/2, where all masks are equally probable; other rates: `test_enumeration`."""
    rate = 0.5
    network = softmax_regression(rate)
    inputs = jax.random.normal(getkey(), (4, 6))
    variables = network.init(getkey(), inputs)
    masks = all_masks(6)
    log_probs = jax.vmap(
        lambda mask: weight_scaling(network, variables, jdrop.apply_mask(mask[None], inputs, rate))
    )(masks)
    scaled = weight_scaling(network, variables, inputs)
    np.testing.assert_allclose(pool(log_probs, "geometric"), scaled, rtol=1e-4, atol=1e-5)
    assert np.abs(pool(log_probs) - scaled).max() > 1e-2


def test_the_logits_of_a_deep_linear_network_average_to_those_of_weight_scaling(getkey):
    rate = 0.25
    inputs = jax.random.normal(getkey(), (3, 4))
    kernels = [jax.random.normal(getkey(), shape) for shape in ((4, 4), (4, 4), (4, 2))]

    def logits(first, second):
        x = jdrop.apply_mask(first[None], inputs @ kernels[0], rate)
        return jdrop.apply_mask(second[None], x @ kernels[1], rate) @ kernels[2]

    masks = all_masks(4)
    weights = mask_weights(masks, rate)
    every = jax.vmap(jax.vmap(logits, (None, 0)), (0, None))(masks, masks)
    mean = jnp.einsum("i,j,ijbc->bc", weights, weights, every)
    np.testing.assert_allclose(mean, inputs @ kernels[0] @ kernels[1] @ kernels[2], rtol=1e-4)


@pytest.mark.parametrize("outputs_shape", [(8,), (8, 1), (8, 3)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_a_regression_is_read_as_it_is_and_averaged_over_masks(getkey, outputs_shape, dtype):
    """Nothing is normalised; the average is that of the outputs with the keys of the samples."""
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(np.linspace(-3, 4, math.prod(outputs_shape)), dtype).reshape(outputs_shape)

        def network(variables, inputs, key):
            return inputs if key is None else jdrop.dropout(key, inputs, 0.5)

        read = weight_scaling(network, {}, x, regression=True)
        assert read.dtype == dtype
        assert jnp.array_equal(read, x)
        key, num_samples = getkey(), 7
        average = monte_carlo(key, network, {}, x, num_samples=num_samples, regression=True)
        assert average.dtype == jnp.promote_types(dtype, jnp.float32)
        samples = [
            np.asarray(network({}, x, jax.random.fold_in(key, t)), np.float64)
            for t in range(num_samples)
        ]
        # Seven updates, each rounded at the largest value, 8.
        atol = 7 * 8 * jnp.finfo(average.dtype).eps
        np.testing.assert_allclose(average, np.mean(samples, 0), rtol=0, atol=atol)


@pytest.mark.parametrize("outputs", [jnp.ones(4), jnp.ones((4, 1))])
def test_outputs_that_are_no_logits_raise_and_name_the_way_out(getkey, outputs):
    def network(variables, inputs, key):
        return outputs

    with pytest.raises(ValueError, match="give `regression=True` for outputs that are no logits"):
        weight_scaling(network, {}, outputs)
    with pytest.raises(ValueError, match="give `regression=True` for outputs that are no logits"):
        monte_carlo(getkey(), network, {}, outputs, num_samples=2)


def test_monte_carlo_comes_near_the_average_over_all_masks(getkey):
    """Within 6 standard errors, the standard deviation over masks being known exactly."""
    rate, num_samples = 0.5, 4000
    network = softmax_regression(rate)
    inputs = jax.random.normal(getkey(), (8, 6))
    variables = network.init(getkey(), inputs)
    masks = all_masks(6)
    probs = jnp.exp(
        jax.vmap(
            lambda mask: weight_scaling(
                network, variables, jdrop.apply_mask(mask[None], inputs, rate)
            )
        )(masks)
    )
    sampled = monte_carlo(getkey(), network, variables, inputs, num_samples=num_samples)
    bound = 6 * probs.std(0) / math.sqrt(num_samples) + 1e-6
    np.testing.assert_array_less(np.abs(jnp.exp(sampled) - probs.mean(0)), bound)


def test_monte_carlo_is_the_pool_of_its_samples(getkey):
    network = NETWORKS["linen"]
    inputs = jax.random.normal(getkey(), (5, 4))
    variables = network.init(getkey(), inputs)
    key = getkey()
    got = monte_carlo(key, network, variables, inputs, num_samples=7)
    keys = [jax.random.fold_in(jax.random.clone(key), sample) for sample in range(7)]
    samples = jnp.stack([jax.nn.log_softmax(network(variables, inputs, key)) for key in keys])
    np.testing.assert_allclose(got, pool(samples), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(samples[0], samples[1])


def test_the_memory_of_monte_carlo_does_not_grow_with_the_samples(getkey):
    network = NETWORKS["linen"]
    inputs = jnp.ones((64, 4))
    variables = network.init(getkey(), inputs)

    def temporary_bytes(num_samples):
        compiled = monte_carlo.lower(
            jax.random.key(0), network, variables, inputs, num_samples=num_samples
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1000) == temporary_bytes(10)


@pytest.mark.parametrize("framework", NETWORKS)
def test_monte_carlo_keeps_batch_statistics_in_evaluation_mode(getkey, framework):
    """An example's prediction does not depend on the others in its batch, apart from its masks."""
    networks = {
        "linen": jdrop.linen.as_network(LinenMLP(rate=0.0)),
        "nnx": jdrop.nnx.as_network(lambda rngs: NnxMLP(rngs, rate=0.0)),
    }
    inputs = 5 + jax.random.normal(getkey(), (6, 4))
    variables = networks[framework].init(getkey(), inputs)
    sampled = monte_carlo(getkey(), networks[framework], variables, inputs, num_samples=1)
    np.testing.assert_allclose(
        sampled, weight_scaling(networks[framework], variables, inputs), rtol=1e-5, atol=1e-6
    )


def test_without_dropout_every_reading_is_the_deterministic_network(getkey):
    network = softmax_regression(rate=0.0)
    inputs = jax.random.normal(getkey(), (4, 6))
    variables = network.init(getkey(), inputs)
    sampled = monte_carlo(getkey(), network, variables, inputs, num_samples=1)
    np.testing.assert_array_equal(sampled, weight_scaling(network, variables, inputs))


def test_no_samples_are_an_error(getkey):
    network = Network(lambda variables, inputs, key: inputs)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        monte_carlo(getkey(), network, {}, jnp.ones((1, 2)), num_samples=0)


def test_many_samples_of_few_digits_stay_probabilities(getkey):
    """Every sample the same: so is the average, in bfloat16 too and however many."""

    def network(variables, inputs, key):
        return jnp.broadcast_to(jnp.array([2.0, 0.0, 0.0], jnp.bfloat16), (len(inputs), 3))

    log_probs = monte_carlo(getkey(), network, {"params": {}}, jnp.ones((1, 1)), num_samples=20_000)
    assert log_probs.dtype == jnp.float32
    assert float(jnp.exp(log_probs).sum()) == pytest.approx(1, abs=1e-5)
    expected = jax.nn.log_softmax(jnp.array([2.0, 0.0, 0.0]))
    np.testing.assert_allclose(log_probs[0], expected, rtol=1e-5)


@pytest.mark.parametrize("method", POOLS)
def test_pools_of_half_precision_are_formed_in_float32(method, getkey):
    log_probs = jax.nn.log_softmax(jax.random.normal(getkey(), (500, 4, 3))).astype(jnp.bfloat16)
    pooled = pool(log_probs, method)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(pooled), pooled_in_float64(log_probs, method), rtol=1e-5)


@pytest.mark.parametrize("method", ["arithmetic", "geometric"])
def test_the_geometric_pool_rules_out_what_one_member_does(method):
    log_probs = jnp.log(jnp.array([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]))
    expected = [1 / 3, 2 / 3] if method == "arithmetic" else [0, 1]
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0]):
        pooled = jnp.exp(pool(log_probs[jnp.array(order)], method))
        np.testing.assert_allclose(pooled, expected, rtol=1e-6)


def test_no_members_are_an_error():
    with pytest.raises(ValueError, match="at least 1 member"):
        pool(jnp.zeros((0, 2, 3)))


def test_a_module_in_place_of_a_network_is_an_error(getkey):
    with pytest.raises(TypeError, match="as_network"):
        weight_scaling(nn.Dense(2), {"params": {}}, jnp.ones((1, 3)))


def test_predict_gives_normalised_log_probabilities_with_and_without_masks(getkey):
    network = NETWORKS["linen"]
    inputs, key = jax.random.normal(getkey(), (5, 4)), getkey()
    variables = network.init(getkey(), inputs)
    for mask_key in (None, key):
        got = predict(mask_key, network, variables, inputs)
        again = None if mask_key is None else jax.random.clone(mask_key)
        expected = jax.nn.log_softmax(network(variables, inputs, again))
        np.testing.assert_array_equal(got, expected)


def test_predict_of_half_precision_is_float32():
    def network(variables, inputs, key):
        return inputs.astype(jnp.bfloat16)

    assert predict(None, network, {}, jnp.ones((2, 3))).dtype == jnp.float32
    outputs = predict(None, network, {}, jnp.ones((2, 3)), regression=True)
    assert outputs.dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(), (4,)])
def test_predict_refuses_outputs_without_a_class_axis_unless_regression(shape):
    inputs = jnp.ones(shape)

    def network(variables, inputs, key):
        return 2 * inputs

    with pytest.raises(ValueError, match=r"must return logits .batch, class.*regression=True"):
        predict(None, network, {}, inputs)
    np.testing.assert_array_equal(predict(None, network, {}, inputs, regression=True), 2 * inputs)
