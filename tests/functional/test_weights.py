"""Scaling the weights for prediction."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dropouts import TAKES_A_RATE, assert_same_bits, kept_probability
from jax import Array

import jdrop

clone = jax.random.clone


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass
class Block:
    inner: Any


PYTREES: dict[str, tuple[Any, str]] = {
    "dict": ({"Dense_1": {"kernel": 1, "bias": 1}, "Dense_0": 1}, "Dense_1/kernel"),
    "list": ([1, [1, 1]], "1/0"),
    "tuple": ((1, None, 1), "2"),
    "NamedTuple": (Layer(1, 1), "kernel"),
    "dataclass": (Block([Layer(1, 1), 1]), "inner/0/kernel"),
    "single leaf": (1, ""),
}


@pytest.mark.parametrize("tree", PYTREES)
def test_named_weights_are_scaled_and_the_others_are_the_same_objects(tree, getkey):
    structure, path = PYTREES[tree]
    params = jax.tree.map(lambda _: jax.random.normal(getkey(), (4, 3)), structure)
    scaled = jdrop.scale_weights(params, {path: 0.25})
    assert jax.tree.structure(scaled) == jax.tree.structure(params)
    leaves = jax.tree.leaves_with_path(params)
    for (leaf_path, leaf), result in zip(leaves, jax.tree.leaves(scaled), strict=True):
        if jax.tree_util.keystr(leaf_path, simple=True, separator="/") == path:
            assert_same_bits(result, 0.75 * leaf)
        else:
            assert result is leaf


def test_weights_are_scaled_under_jit_by_a_rate_for_each_unit(getkey):
    params = {"a": jax.random.normal(getkey(), (4, 3)), "b": jnp.arange(3)}
    rates = jnp.array([0.0, 0.25, 0.5, 1.0])[:, None]
    expected = params["a"] * (1 - rates)
    scaled = jax.jit(lambda params, rates: jdrop.scale_weights(params, {"a": rates}))(params, rates)
    assert_same_bits(scaled["a"], expected)
    assert_same_bits(scaled["b"], params["b"])
    assert jnp.isnan(jax.jit(TAKES_A_RATE["scale_weights"])(1.5)["w"]).all()


@pytest.mark.parametrize("path", ["kernel", "Dense_0", "Dense_0/kernel/", "", "Dense_0.kernel"])
def test_a_missing_path_raises_and_the_message_lists_all_paths(path):
    params = {"Dense_0": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=rf"{path!r}.*Dense_0/bias, Dense_0/kernel"):
        jdrop.scale_weights(params, {"Dense_0/kernel": 0.5, path: 0.5})


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.5, 0.3])
def test_scaling_in_training_or_at_prediction_trains_the_same_network(rate, getkey):
    """The weights of both networks differ by the factor q, and their outputs are equal.

    Weights larger by 1 / q have gradients smaller by q, so their learning rate is lr / q^2.
    """
    with jax.enable_x64(True):
        inputs, labels = jax.random.normal(getkey(), (8, 5)), jax.random.normal(getkey(), (8, 2))
        scaled = {
            "hidden": {"kernel": jax.random.normal(getkey(), (5, 6))},
            "out": {"kernel": jax.random.normal(getkey(), (6, 2)), "bias": jnp.zeros((1, 2))},
        }
        q = float(kept_probability(rate))
        unscaled = {**scaled, "out": {**scaled["out"], "kernel": scaled["out"]["kernel"] / q}}

        @partial(jax.jit, static_argnums=2)
        def predict(params: Any, key: Array, scale: bool) -> Array:
            hidden = jnp.tanh(inputs @ params["hidden"]["kernel"])
            hidden = jdrop.dropout(key, hidden, rate, scale=scale)
            return hidden @ params["out"]["kernel"] + params["out"]["bias"]

        @partial(jax.jit, static_argnums=2)
        def train(params: Any, key: Array, scale: bool, out_kernel_lr: float) -> Any:
            loss = lambda params: ((predict(params, key, scale) - labels) ** 2).mean()  # noqa: E731
            lrs = jax.tree.map(lambda _: 0.1, params)
            lrs["out"]["kernel"] = out_kernel_lr
            return jax.tree.map(lambda w, g, lr: w - lr * g, params, jax.grad(loss)(params), lrs)

        start = scaled
        for _ in range(8):
            key = getkey()
            with_key = [predict(*a) for a in ((scaled, clone(key), True), (unscaled, key, False))]
            np.testing.assert_allclose(*with_key, rtol=1e-10, atol=1e-12)
            key = clone(key)
            scaled = train(scaled, clone(key), True, 0.1)
            unscaled = train(unscaled, clone(key), False, 0.1 / q**2)
            for_prediction = jdrop.scale_weights(unscaled, {"out/kernel": rate})
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
                for_prediction,
                scaled,
            )
        assert not np.allclose(start["out"]["kernel"], scaled["out"]["kernel"], rtol=0.01)


def test_a_rate_for_each_unit_scales_the_weights_that_read_the_unit():
    weights = {"kernel": jnp.ones((2, 2)), "conv": jnp.ones((3, 3, 2, 4)), "scale": jnp.ones(2)}
    rates = jnp.array([0.0, 0.5])
    scaled = jdrop.scale_weights(weights, dict.fromkeys(weights, rates))
    assert_same_bits(scaled["kernel"], jnp.array([[1.0, 1.0], [0.5, 0.5]]))
    assert_same_bits(scaled["conv"][1, 2, :, 3], jnp.array([1.0, 0.5]))
    assert_same_bits(scaled["scale"], jnp.array([1.0, 0.5]))
