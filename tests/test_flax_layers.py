"""jdrop's layers where code expects Flax's: selected by class, viewed, named, and given state."""

import inspect
import warnings
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop.network import record_masks

pytestmark = pytest.mark.grid

ATTENTION_NAMES = ("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention")


@pytest.mark.parametrize("name", ["Dropout", *ATTENTION_NAMES])
def test_a_linen_layer_is_an_instance_of_the_class_that_it_replaces(name):
    argument = 0.5 if name == "Dropout" else 2
    assert isinstance(getattr(jdrop.linen, name)(argument), getattr(nn, name))


def make_nnx_model(layers: Any, rngs: nnx.Rngs) -> nnx.Module:
    """A model of the layers of a module, jdrop's or Flax's."""
    attention = layers.MultiHeadAttention(2, 8, dropout_rate=0.5, decode=False, rngs=rngs)
    return nnx.Sequential(attention, layers.Dropout(0.5, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))


@pytest.mark.parametrize("name", ["Dropout", "MultiHeadAttention"])
def test_an_nnx_layer_is_selected_by_the_class_that_it_replaces(name, getkey):
    flax_class = getattr(nnx, name)
    model = make_nnx_model(jdrop.nnx, nnx.Rngs(getkey()))
    (layer,) = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, flax_class)]
    model.set_attributes(flax_class, deterministic=True)
    assert layer.deterministic is True
    view = nnx.view(model, only=flax_class, deterministic=False)
    modes = [
        layer.deterministic for _, layer in nnx.iter_modules(view) if "deterministic" in vars(layer)
    ]
    assert modes.count(False) == (2 if name == "MultiHeadAttention" else 1)


def test_a_view_is_described_as_that_of_flax_layers(getkey):
    expected = nnx.view_info(make_nnx_model(nnx, nnx.Rngs(getkey())))
    assert "Dropout:\n  deterministic: bool | None = None" in expected
    assert nnx.view_info(make_nnx_model(jdrop.nnx, nnx.Rngs(getkey()))) == expected


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_an_attention_layer_has_the_parameters_and_outputs_of_flax(name, getkey):
    """The name of the class is part of the paths of the parameters."""
    key, x = getkey(), jax.random.normal(getkey(), (3, 10, 8))

    class Block(nn.Module):
        layer: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            return self.layer(num_heads=2)(x)

    with warnings.catch_warnings():
        # Flax warns at each call of SelfAttention.
        warnings.simplefilter("ignore", DeprecationWarning)
        expected, flax_variables = Block(getattr(nn, name)).init_with_output(
            jax.random.clone(key), x
        )
        actual, variables = Block(getattr(jdrop.linen, name)).init_with_output(key, x)
    assert list(variables["params"]) == [f"{name}_0"]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables, flax_variables))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("name", ATTENTION_NAMES)
def test_an_attention_layer_takes_the_arguments_of_flax_and_drops_per_head(name):
    """All but two defaults are Flax's."""
    ours, flax_class = getattr(jdrop.linen, name), getattr(nn, name)
    defaults = {key: value.default for key, value in inspect.signature(ours).parameters.items()}
    flax_defaults = {
        key: value.default for key, value in inspect.signature(flax_class).parameters.items()
    }
    assert list(defaults) == list(flax_defaults)
    changed = {key for key, value in defaults.items() if value != flax_defaults[key]}
    assert changed == {"broadcast_dropout", "attention_fn"}
    with pytest.raises(ValueError, match=r"dropout_rate must lie in \[0, 1\)"):
        ours(2, dropout_rate=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [6, 150])
def test_attention_of_complex_numbers_equals_flax(length, getkey):
    x = jax.random.normal(getkey(), (2, length, 8), jnp.complex64)
    layers = [module.MultiHeadDotProductAttention(2) for module in (nn, jdrop.linen)]
    variables = layers[0].init(getkey(), x)
    mask = jax.random.bernoulli(getkey(), 0.7, (2, 2, length, length))
    expected, actual = (layer.apply(variables, x, mask=mask) for layer in layers)
    assert actual.dtype == jnp.complex64
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.slow
def test_attention_of_complex_numbers_drops_weights(getkey):
    """With the identity as values, the outputs are the weights."""
    q, k = (jax.random.normal(getkey(), (1, 4, 1, 3), jnp.complex64) for _ in range(2))
    v = jnp.eye(4, dtype=jnp.complex64)[None, :, None]
    whole = jdrop.dot_product_attention(None, q, k, v, dropout_rate=0.0)
    dropped = jdrop.dot_product_attention(getkey(), q, k, v, dropout_rate=0.5)
    assert 0 < (dropped == 0).sum() < dropped.size
    np.testing.assert_allclose(dropped, jnp.where(dropped == 0, 0, 2 * whole), rtol=1e-5)


def test_masks_change_at_each_step_of_a_trainer_that_feeds_every_collection_back(getkey):
    """The layer stores nothing, so there is no mask that the next step could use again."""
    layer, x, variables, outputs = (
        jdrop.linen.Dropout(0.5, deterministic=False),
        jnp.ones((8, 12)),
        {},
        [],
    )
    for _ in range(2):
        dropped, updates = layer.apply(
            variables, x, rngs={"dropout": getkey()}, mutable=flax.core.DenyList("params")
        )
        variables = {**variables, **updates}
        outputs.append(dropped)
    assert not variables
    assert not jnp.array_equal(*outputs)


class Pruned(nn.Module):
    """A module with a collection of its own that is called masks."""

    @nn.compact
    def __call__(self, x, train=False):
        pruned = self.variable("masks", "pruned", lambda: jnp.arange(x.shape[-1]) % 2 == 0)
        return jdrop.linen.Dropout(0.5, deterministic=not train)(jnp.where(pruned.value, x, 0))


def test_a_collection_of_the_user_called_masks_is_left_alone(getkey):
    network, x = jdrop.linen.as_network(Pruned()), jnp.ones((40, 4))
    variables = network.init(getkey(), x)
    outputs, masks = record_masks(getkey(), network, variables, x)
    assert list(masks) == ["Dropout_0"]
    assert jnp.array_equal(
        outputs, jnp.where(masks["Dropout_0"][0], 2 * variables["masks"]["pruned"], 0)
    )
    _, trained = network.apply_train(variables, x, getkey())
    assert jnp.array_equal(trained["masks"]["pruned"], variables["masks"]["pruned"])
