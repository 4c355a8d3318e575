"""Convolutions with another order of axes, and the gradients of convolutions in loops."""

from functools import partial

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jdrop.linen
from jdrop import ensemble
from jdrop.convolutions import has_convolution, with_channels_last
from jdrop.train import TrainState, fit, train_step

# Sums of some hundred products of order 1, in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}

CHANNELS_LAST = "b01f_01io->b01f"
"""The order of axes for which the CPU has fast code, as a compiled program writes it."""


def convolve(inputs, kernel, layout=("NHWC", "HWIO", "NHWC"), **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(inputs, kernel, dimension_numbers=layout, **options)


def slow_convolutions(function, *arguments):
    """The convolutions in another order of the program that runs on this machine."""
    program = jax.jit(function).lower(*arguments).compile().as_text()
    convolutions = [line for line in program.splitlines() if " convolution(" in line]
    assert convolutions
    return [line for line in convolutions if CHANNELS_LAST not in line]


# The rewriting.

OPTIONS = {
    "plain": {},
    "stride 2": {"window_strides": (2, 2)},
    "padding": {"padding": ((2, 0), (0, 3))},
    "dilated kernel": {"rhs_dilation": (2, 1)},
    "dilated inputs": {"lhs_dilation": (1, 2), "padding": ((1, 1), (1, 1))},
    "two groups": {"feature_group_count": 2},
    "one group per channel": {"feature_group_count": 4},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_gradients_of_convolutions_do_not_change(getkey, case):
    options = OPTIONS[case]
    inputs = jax.random.normal(getkey(), (3, 6, 7, 4))
    groups = options.get("feature_group_count", 1)
    kernel = jax.random.normal(getkey(), (3, 3, 4 // groups, 8))

    def loss(inputs, kernel):
        return jnp.sum(jnp.sin(convolve(inputs, kernel, **options)))

    gradient = jax.grad(loss, argnums=(0, 1))
    expected = gradient(inputs, kernel)
    results = jax.jit(with_channels_last(gradient))(inputs, kernel)
    for result, array in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, array, **ROUNDING)


@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_any_order_of_axes_gives_the_same_outputs(getkey, num_axes):
    spatial = "DHW"[-num_axes:]
    shape = (3, 4, 5, 6, 7)[: num_axes + 2]
    for layout in [
        (f"NC{spatial}", f"OI{spatial}", f"NC{spatial}"),
        (f"{spatial}CN", f"I{spatial}O", f"C{spatial}N"),
    ]:
        axes = lax.conv_dimension_numbers(shape, (3,) * (num_axes + 2), layout)
        kernel_shape = np.full(num_axes + 2, 3)
        kernel_shape[list(axes.rhs_spec[:2])] = 2, shape[axes.lhs_spec[1]]
        inputs = jax.random.normal(getkey(), shape)
        kernel = jax.random.normal(getkey(), kernel_shape)
        function = partial(convolve, layout=layout, window_strides=range(1, num_axes + 1))
        expected = function(inputs, kernel)
        rewritten = jax.jit(with_channels_last(function))(inputs, kernel)
        np.testing.assert_allclose(rewritten, expected, **ROUNDING)


def in_branches(inputs, kernel):
    return lax.cond(
        inputs.sum() > 0, convolve, lambda x, kernel: convolve(-x, kernel), inputs, kernel
    )


@pytest.mark.parametrize(
    "function", [convolve, jax.jit(convolve), jax.checkpoint(convolve), in_branches],
    ids=["bare", "jit", "checkpoint", "cond"],
)  # fmt: skip
def test_gradients_in_a_loop_hold_fast_convolutions_only(getkey, function):
    def loss(kernel, inputs):
        def body(total, batch):
            return total + jnp.sum(function(batch, kernel) ** 2), None

        return lax.scan(body, 0.0, inputs)[0]

    gradient = jax.grad(loss)
    kernel, inputs = jnp.ones((3, 3, 4, 8)), jax.random.normal(getkey(), (5, 2, 6, 6, 4))
    assert slow_convolutions(gradient, kernel, inputs)
    assert not slow_convolutions(with_channels_last(gradient), kernel, inputs)
    expected = gradient(kernel, inputs)
    scale = float(jnp.abs(expected).max())
    rewritten = jax.jit(with_channels_last(gradient))(kernel, inputs)
    np.testing.assert_allclose(rewritten, expected, rtol=1e-4, atol=1e-5 * scale)


def test_other_backends_get_the_convolutions_as_they_are():
    def gradient(inputs, kernel):
        return jax.grad(lambda kernel: jnp.sum(convolve(inputs, kernel) ** 2))(kernel)

    inputs, kernel = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 8))

    def convolutions(function, platform):
        exported = jax.export.export(jax.jit(function), platforms=[platform])(inputs, kernel)
        text = exported.mlir_module().split("dim_numbers = ")
        return sorted(part.split(",")[0:8] for part in text[1:])

    for platform in ("tpu", "cuda"):
        rewritten = convolutions(with_channels_last(gradient), platform)
        assert rewritten == convolutions(gradient, platform)
    assert convolutions(with_channels_last(gradient), "cpu") != convolutions(gradient, "cpu")


def test_outside_of_transformations_the_function_sees_its_arrays():
    def absolute(x):
        return x if x > 0 else -x

    assert with_channels_last(absolute)(jnp.float32(-2)) == 2


# Training.


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(4, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(x))))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x.mean((1, 2)))


NETWORK = jdrop.linen.as_network(CNN())


def make_state(getkey, inputs):
    return ensemble.init_ensemble(getkey(), NETWORK, optax.sgd(0.1), inputs[:1], ensemble_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["vmap", "scan"])
def test_training_holds_fast_convolutions_only(getkey, batching):
    inputs, labels = jax.random.normal(getkey(), (6, 6, 6, 2)), jnp.arange(6) % 3
    many = make_state(getkey, inputs)
    one = jax.tree.map(lambda leaf: leaf[0], many)
    sizes = {"num_epochs": 2, "batch_size": 2}
    fit_one = partial(fit, **sizes)
    fit_many = partial(ensemble.fit_ensemble, batching=batching, **sizes)
    assert not slow_convolutions(fit_one, getkey(), one, inputs, labels)
    assert not slow_convolutions(fit_many, getkey(), many, inputs, labels)

    def steps(key, state):
        def step(state, key):
            return train_step(key, state, (inputs, labels))[0], None

        return lax.scan(step, state, jax.random.split(key, 3))[0]

    assert not slow_convolutions(steps, getkey(), one)


@pytest.mark.slow
def test_members_with_convolutions_in_turn_equal_members_at_once(getkey):
    inputs, labels = jax.random.normal(getkey(), (6, 6, 6, 2)), jnp.arange(6) % 3
    state, key = make_state(getkey, inputs), getkey()
    results = [
        ensemble.fit_ensemble(
            jax.random.clone(key),
            state,
            inputs,
            labels,
            num_epochs=2,
            batch_size=3,
            batching=batching,
        )
        for batching in ("vmap", "scan")
    ]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_debug_nans_sees_into_a_step(getkey):
    inputs, labels = jax.random.normal(getkey(), (6, 6, 6, 2)), jnp.arange(6) % 3
    network = jdrop.linen.as_network(CNN())
    state = TrainState.create(network, network.init(getkey(), inputs), optax.sgd(0.1))
    with jax.debug_nans(True):
        assert int(train_step(getkey(), state, (inputs, labels))[0].step) == 1
        with pytest.raises(FloatingPointError):
            train_step(getkey(), state, (inputs * jnp.inf, labels))


def test_a_convolution_is_found_in_loops_and_branches():
    inputs, kernel = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 4))

    def in_loop(inputs, kernel):
        return lax.scan(lambda x, _: (in_branches(x, kernel), None), inputs, length=2)

    for function in (convolve, jax.jit(convolve), in_branches, in_loop):
        assert has_convolution(function, inputs, kernel)
    assert not has_convolution(jax.jit(jnp.dot), kernel, kernel[0, 0])
