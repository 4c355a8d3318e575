"""`jax.export` with symbolic sizes: the exported program computes what the function computes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import jdrop
import jdrop.linen
import jdrop.nnx

pytestmark = pytest.mark.grid

BATCH, LENGTH = export.symbolic_shape("b, s")
ANY_LONG = (*export.symbolic_shape("b, s", constraints=["s >= 32"]), 8)
ANY_WIDE = (50, *export.symbolic_shape("w", constraints=["w >= 2"]))


def exported(f: Callable[..., Any], shape: tuple[Any, ...]) -> Callable[..., Any]:
    """The exported program of `f(key, inputs)` for inputs of this shape."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return export.export(jax.jit(f))(key, jax.ShapeDtypeStruct(shape, jnp.float32)).call


@pytest.mark.parametrize("rate", [0.5, 0.1, jnp.float32(0.3)], ids=["1 bit", "16 bits", "array"])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((BATCH,), [(1,), (9000,)]),
        ((BATCH, 8), [(1, 8), (3000, 8)]),
        ((BATCH, 3, 40), [(1, 3, 40), (50, 3, 40)]),
        ((BATCH, 197, 8), [(3, 197, 8)]),
        # The lengths make groups of rows of their own, whatever they are.
        (ANY_LONG, [(2, 32, 8), (2, 50, 8)]),
        (ANY_WIDE, [(50, 2), (50, 100)]),
    ],
    ids=str,
)
def test_dropout_of_a_symbolic_size_draws_the_masks_of_each_size(shape, sizes, rate, getkey):
    def drop(key: jax.Array, x: jax.Array) -> jax.Array:
        return jdrop.dropout(key, x, rate)

    call = exported(drop, shape)
    for size in sizes:
        key, x = getkey(), jnp.ones(size)
        assert jnp.array_equal(call(jax.random.clone(key), x), drop(key, x))


def test_axes_that_share_decisions_may_be_symbolic(getkey):
    def drop(key: jax.Array, x: jax.Array) -> jax.Array:
        return jdrop.dropout(key, x, 0.5, broadcast_dims=(1,))

    key, x = getkey(), jnp.ones((5, 3, 8))
    actual = exported(drop, (BATCH, LENGTH, 8))(jax.random.clone(key), x)
    assert jnp.array_equal(actual, drop(key, x))


@pytest.mark.parametrize("shape", [(BATCH, LENGTH, 8), (4, LENGTH)], ids=str)
def test_a_mask_whose_bits_depend_on_a_symbolic_size_is_refused(shape):
    with pytest.raises(ValueError, match="a symbolic size after the first is 1, or less than 32"):
        exported(lambda key, x: jdrop.dropout(key, x, 0.5), shape)


@pytest.mark.parametrize("layer", [jdrop.linen.Dropout, nn.Dropout])
def test_a_dropout_layer_is_exported_for_any_batch(layer, getkey):
    def drop(key: jax.Array, x: jax.Array) -> jax.Array:
        return layer(0.5, deterministic=False).apply({}, x, rngs={"dropout": key})

    key, x = getkey(), jnp.ones((5, 8))
    assert jnp.array_equal(exported(drop, (BATCH, 8))(jax.random.clone(key), x), drop(key, x))


@pytest.mark.parametrize("length", [1, 128, 300])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_without_dropout_is_exported_for_any_length(length, is_causal, getkey):
    def attend(key: jax.Array, x: jax.Array) -> jax.Array:
        mask = jnp.ones((x.shape[0], 1, 1, x.shape[1]), bool)
        return jdrop.dot_product_attention(
            None, x, x, x, mask=mask, dropout_rate=0.0, is_causal=is_causal
        )

    x = jax.random.normal(getkey(), (2, length, 4, 8))
    actual = exported(attend, (BATCH, LENGTH, 4, 8))(getkey(), x)
    np.testing.assert_allclose(actual, attend(getkey(), x), atol=1e-6)


@pytest.mark.slow
def test_layers_of_attention_are_exported_for_any_length(getkey):
    x = jax.random.normal(getkey(), (2, 5, 8))
    linen = jdrop.linen.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=True)
    variables = linen.init(getkey(), x)
    of_nnx = jdrop.nnx.MultiHeadAttention(
        2, 8, dropout_rate=0.1, deterministic=True, decode=False, rngs=nnx.Rngs(getkey())
    )
    for layer in (lambda key, x: linen.apply(variables, x), lambda key, x: of_nnx(x)):
        actual = exported(layer, (BATCH, LENGTH, 8))(getkey(), x)
        np.testing.assert_allclose(actual, layer(None, x), atol=1e-6)


def test_attention_with_dropout_is_exported_for_any_batch_but_not_for_any_length(getkey):
    def attend(key: jax.Array, x: jax.Array) -> jax.Array:
        return jdrop.dot_product_attention(key, x, x, x, dropout_rate=0.5)

    key, x = getkey(), jax.random.normal(getkey(), (3, 5, 2, 4))
    actual = exported(attend, (BATCH, 5, 2, 4))(jax.random.clone(key), x)
    np.testing.assert_allclose(actual, attend(key, x), atol=1e-6)
    with pytest.raises(ValueError, match="the length of q must be a number while dropout is on"):
        exported(attend, (BATCH, LENGTH, 2, 4))


PROGRAMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "dropout": lambda key, x: jdrop.dropout(key, x, 0.1),
    "channel rates": lambda key, x: jdrop.dropout(key, x, jnp.linspace(0.0, 0.5, x.shape[-1])),
    "gradient": jax.grad(lambda key, x: jdrop.dropout(key, jnp.sin(x), 0.5).sum(), argnums=1),
    "attention": lambda key, x: jdrop.dot_product_attention(key, x, x, x, dropout_rate=0.1),
    "drop_path": lambda key, x: jdrop.drop_path(key, x, 0.2),
}


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_lowered_for_all_platforms_at_once(program, impl):
    key = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    x = jax.ShapeDtypeStruct((2, 150, 4, 8), jnp.bfloat16)
    platforms = ("cpu", "cuda", "rocm", "tpu")
    lowered = export.export(jax.jit(PROGRAMS[program]), platforms=platforms)(key, x)
    assert lowered.platforms == platforms


def test_a_program_of_several_platforms_draws_the_same_masks(getkey):
    key, x = getkey(), jnp.ones((2, 150, 40))
    drop = PROGRAMS["dropout"]
    both = export.export(jax.jit(drop), platforms=["cpu", "tpu"])(key, x)
    assert jnp.array_equal(both.call(jax.random.clone(key), x), drop(key, x))
