"""Max-norm: the weights into a unit lie within the limit after each update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdrop.train import TrainState, max_norm, train_step


def constrained(params, updates, limit):
    optimizer = max_norm(limit)
    updates, _ = optimizer.update(updates, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


def test_a_unit_beyond_the_limit_is_scaled_to_it_and_others_stay():
    """By hand: the columns become (3, 4), of norm 5, and (0.6, 0.8), of norm 1."""
    params = jnp.array([[2.0, 0.5], [5.0, 1.0]])
    updates = jnp.array([[1.0, 0.1], [-1.0, -0.2]])
    expected = [[3 * 2 / 5, 0.6], [4 * 2 / 5, 0.8]]
    np.testing.assert_allclose(constrained(params, updates, 2.0), expected, rtol=1e-6)


def test_the_norm_of_a_convolution_is_over_all_weights_into_a_channel():
    """By hand: 2 x 2 x 1 weights of 3 have the norm 6."""
    params = jnp.stack([jnp.full((2, 2, 1), 3.0), jnp.full((2, 2, 1), 0.1)], -1)
    result = constrained(params, jnp.zeros_like(params), 3.0)
    np.testing.assert_allclose(result[..., 0], 1.5, rtol=1e-6)
    np.testing.assert_allclose(result[..., 1], 0.1, rtol=1e-6)


def test_biases_are_free():
    params = {"kernel": jnp.full((1, 1), 9.0), "bias": jnp.array([9.0])}
    result = constrained(params, jax.tree.map(jnp.zeros_like, params), 1.0)
    np.testing.assert_allclose(result["kernel"], 1.0, rtol=1e-6)
    np.testing.assert_array_equal(result["bias"], 9.0)


def test_weights_of_0_stay_0():
    params = jnp.zeros((2, 2))
    np.testing.assert_array_equal(constrained(params, params, 1.0), 0)


def test_training_keeps_every_unit_within_the_limit(getkey):
    def apply_fn(variables, inputs, key):
        return inputs @ variables["params"]["kernel"]

    params = {"kernel": 3 * jax.random.normal(getkey(), (4, 3))}
    optimizer = optax.chain(optax.sgd(5.0), max_norm(1.0))
    state = TrainState.create(apply_fn, {"params": params}, optimizer)
    batch = jax.random.normal(getkey(), (8, 4)), jnp.arange(8) % 3
    for _ in range(5):
        state, _ = train_step(getkey(), state, batch)
        norms = jnp.linalg.norm(state.variables["params"]["kernel"], axis=0)
        assert (norms <= 1 + 1e-5).all()
    assert (norms > 0.99).any()


def test_layers_have_limits_of_their_own():
    params = {"first": jnp.full((1, 1), 9.0), "second": jnp.full((1, 1), 9.0)}
    optimizer = optax.chain(
        optax.masked(max_norm(1.0), {"first": True, "second": False}),
        optax.masked(max_norm(2.0), {"first": False, "second": True}),
    )
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    result = optax.apply_updates(params, updates)
    np.testing.assert_allclose(result["first"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(result["second"], 2.0, rtol=1e-6)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_not_above_0_is_an_error(limit):
    with pytest.raises(ValueError, match="limit must be above 0, got"):
        max_norm(limit)


def test_an_update_without_parameters_is_an_error():
    optimizer = max_norm(1.0)
    params = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="max_norm needs the parameters"):
        optimizer.update(params, optimizer.init(params))
