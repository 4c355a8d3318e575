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
from jdrop.network import Network


def random_log_probs(key, *shape):
    return jax.nn.log_softmax(3 * jax.random.normal(key, shape))


def pooled_in_float64(log_probs, kind, weights=None):
    log_probs = np.asarray(log_probs, np.float64)
    weights = np.ones(len(log_probs)) if weights is None else np.asarray(weights, np.float64)
    total = weights.sum()
    mean = np.tensordot(weights, np.exp(log_probs), 1) / total
    if kind == "arithmetic":
        return mean
    if kind == "geometric":
        unnormalised = np.exp(np.tensordot(weights, log_probs, 1) / total)
        return unnormalised / unnormalised.sum(-1, keepdims=True)
    votes = np.tensordot(weights, np.eye(log_probs.shape[-1])[log_probs.argmax(-1)], 1)
    return (votes + mean) / (total + 1)


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0, 0.5, 3.0]], ids=["equal", "weighted"])
def test_pools_equal_their_definition_in_float64(getkey, kind, weights):
    log_probs = random_log_probs(getkey(), 5, 20, 4)
    weights = None if weights is None else jnp.array(weights)
    got = jnp.exp(pool(log_probs, kind, weights=weights))
    np.testing.assert_allclose(got, pooled_in_float64(log_probs, kind, weights), rtol=2e-5)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
@pytest.mark.parametrize("copies", [1, 4])
def test_identical_members_pool_to_themselves(getkey, kind, copies):
    member = random_log_probs(getkey(), 20, 4)
    np.testing.assert_allclose(
        pool(jnp.stack([member] * copies), kind), member, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", POOLS)
def test_the_order_of_members_does_not_matter(getkey, kind):
    log_probs = random_log_probs(getkey(), 6, 20, 4)
    np.testing.assert_allclose(pool(log_probs[::-1], kind), pool(log_probs, kind), rtol=1e-4)


@pytest.mark.parametrize("kind", POOLS)
def test_a_weight_is_a_number_of_copies(getkey, kind):
    log_probs = random_log_probs(getkey(), 3, 20, 4)
    copied = jnp.stack([log_probs[0], log_probs[0], log_probs[2]])
    weighted = pool(log_probs, kind, weights=jnp.array([2.0, 0.0, 1.0]))
    np.testing.assert_allclose(weighted, pool(copied, kind), rtol=1e-5, atol=1e-5)


def test_a_member_of_weight_zero_may_be_certain():
    log_probs = jnp.array([[-0.5, math.log(1 - math.exp(-0.5))], [0.0, -math.inf]])
    for kind in POOLS:
        assert np.isfinite(pool(log_probs, kind, weights=jnp.array([1.0, 0.0]))).all()


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


@pytest.mark.parametrize("kind", POOLS)
def test_confident_members_stay_finite(kind):
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
    pooled = pool(jax.nn.log_softmax(logits), kind)
    assert np.isfinite(pooled).all()
    np.testing.assert_allclose(jnp.exp(pooled), [0.5, 0.5], rtol=1e-5)


def test_an_unknown_pool_is_an_error(getkey):
    with pytest.raises(ValueError, match="must be one of arithmetic, geometric, vote, got 'mean'"):
        pool(random_log_probs(getkey(), 2, 3), "mean")


def all_masks(units):
    return jnp.array(list(itertools.product([False, True], repeat=units)))


def mask_weights(masks, rate):
    kept = masks.sum(1)
    return (1 - rate) ** kept * rate ** (masks.shape[1] - kept)


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_weight_scaling_is_the_geometric_pool_of_all_masks_of_softmax_regression(getkey, rate):
    network = softmax_regression(rate)
    inputs = jax.random.normal(getkey(), (4, 6))
    variables = network.init(getkey(), inputs)
    masks = all_masks(6)
    log_probs = jax.vmap(
        lambda mask: weight_scaling(network, variables, jdrop.apply_mask(mask[None], inputs, rate))
    )(masks)
    exact = {
        kind: pool(log_probs, kind, weights=mask_weights(masks, rate))
        for kind in ("geometric", "arithmetic")
    }
    scaled = weight_scaling(network, variables, inputs)
    np.testing.assert_allclose(exact["geometric"], scaled, rtol=1e-4, atol=1e-5)
    assert np.abs(exact["arithmetic"] - scaled).max() > 1e-2


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


@pytest.mark.parametrize("kind", POOLS)
def test_monte_carlo_is_the_pool_of_its_samples(getkey, kind):
    network = NETWORKS["linen"]
    inputs = jax.random.normal(getkey(), (5, 4))
    variables = network.init(getkey(), inputs)
    key = getkey()
    got = monte_carlo(key, network, variables, inputs, num_samples=7, kind=kind)
    keys = [jax.random.fold_in(jax.random.clone(key), sample) for sample in range(7)]
    samples = jnp.stack([jax.nn.log_softmax(network(variables, inputs, key)) for key in keys])
    np.testing.assert_allclose(got, pool(samples, kind), rtol=1e-4, atol=1e-5)
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


@pytest.mark.parametrize("kind", NETWORKS)
def test_monte_carlo_keeps_batch_statistics_in_evaluation_mode(getkey, kind):
    """An example's prediction does not depend on the others in its batch, apart from its masks."""
    networks = {
        "linen": jdrop.linen.as_network(LinenMLP(rate=0.0)),
        "nnx": jdrop.nnx.as_network(lambda rngs: NnxMLP(rngs, rate=0.0)),
    }
    inputs = 5 + jax.random.normal(getkey(), (6, 4))
    variables = networks[kind].init(getkey(), inputs)
    sampled = monte_carlo(getkey(), networks[kind], variables, inputs, num_samples=1)
    np.testing.assert_allclose(
        sampled, weight_scaling(networks[kind], variables, inputs), rtol=1e-5, atol=1e-6
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


def test_weights_of_another_number_than_the_members_are_an_error(getkey):
    with pytest.raises(ValueError, match=r"each of the 3 members, got the shape \(2,\)"):
        pool(random_log_probs(getkey(), 3, 4), weights=jnp.ones(2))


@pytest.mark.parametrize("kind", POOLS)
def test_many_samples_of_few_digits_stay_probabilities(kind, getkey):
    """Every sample the same: so is the average, in bfloat16 too and however many."""

    def network(variables, inputs, key):
        return jnp.broadcast_to(jnp.array([2.0, 0.0, 0.0], jnp.bfloat16), (len(inputs), 3))

    log_probs = monte_carlo(
        getkey(), network, {"params": {}}, jnp.ones((1, 1)), num_samples=20_000, kind=kind
    )
    assert log_probs.dtype == jnp.float32
    assert float(jnp.exp(log_probs).sum()) == pytest.approx(1, abs=1e-5)
    if kind != "vote":
        expected = jax.nn.log_softmax(jnp.array([2.0, 0.0, 0.0]))
        np.testing.assert_allclose(log_probs[0], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", POOLS)
def test_pools_of_half_precision_are_formed_in_float32(kind, getkey):
    log_probs = jax.nn.log_softmax(jax.random.normal(getkey(), (500, 4, 3))).astype(jnp.bfloat16)
    pooled = pool(log_probs, kind)
    assert pooled.dtype == jnp.float32
    expected = pool(log_probs.astype(jnp.float32), kind, weights=np.ones(500))
    np.testing.assert_allclose(pooled, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("weights", [[-1.0, 2.0], [0.0, 0.0]])
def test_weights_that_mean_nothing_give_nan(kind, weights):
    log_probs = jnp.log(jnp.array([[[0.5, 0.5]], [[0.9, 0.1]]]))
    assert jnp.isnan(pool(log_probs, kind, weights=jnp.array(weights))).all()


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_what_one_member_rules_out(kind):
    log_probs = jnp.log(jnp.array([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]))
    expected = [1 / 3, 2 / 3] if kind == "arithmetic" else [0, 1]
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0]):
        pooled = jnp.exp(pool(log_probs[jnp.array(order)], kind))
        np.testing.assert_allclose(pooled, expected, rtol=1e-6)


def test_no_members_are_an_error():
    with pytest.raises(ValueError, match="a member at least"):
        pool(jnp.zeros((0, 2, 3)))


def test_a_module_in_place_of_a_network_is_an_error(getkey):
    with pytest.raises(TypeError, match="as_network"):
        weight_scaling(nn.Dense(2), {"params": {}}, jnp.ones((1, 3)))
