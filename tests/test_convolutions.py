"""Convolutions with another order of axes, and the gradients of convolutions in loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jdrop.convolutions import with_channels_last
from jdrop.network import Network
from jdrop.train import TrainState, cross_entropy, fit, train_step

SLOW = "01io->"
"""Starts the end of `dim_labels` in the order that is fast, `b01f_01io->b01f`."""

# Sums of some hundred products of order 1, in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


def convolve(inputs, kernel, layout=("NHWC", "HWIO", "NHWC"), **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(inputs, kernel, dimension_numbers=layout, **options)


def orders(jaxpr):
    """The orders of axes of all convolutions that a CPU runs, in a compiled program."""
    return [line.split("dim_labels=")[1].split(",")[0] for line in jaxpr if "dim_labels=" in line]


CASES = {
    "channels last": {},
    "stride 2": {"window_strides": (2, 2)},
    "padding": {"padding": ((2, 0), (0, 3))},
    "dilated kernel": {"rhs_dilation": (2, 1)},
    "dilated inputs": {"lhs_dilation": (1, 2), "padding": ((1, 1), (1, 1))},
    "two groups": {"feature_group_count": 2},
    "one group per channel": {"feature_group_count": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_change(getkey, case):
    options = CASES[case]
    inputs = jax.random.normal(getkey(), (3, 6, 7, 4))
    groups = options.get("feature_group_count", 1)
    kernel = jax.random.normal(getkey(), (3, 3, 4 // groups, 8))

    def loss(inputs, kernel):
        return jnp.sum(jnp.sin(convolve(inputs, kernel, **options)))

    gradient = jax.grad(loss, argnums=(0, 1))
    expected = gradient(inputs, kernel)
    for function in (with_channels_last(gradient), jax.jit(with_channels_last(gradient))):
        jax.tree.map(
            partial(np.testing.assert_allclose, **ROUNDING), function(inputs, kernel), expected
        )


@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_any_order_of_axes_gives_the_same_outputs(getkey, num_axes):
    spatial = "DHW"[-num_axes:]
    shape = (3, 4, 5, 6, 7)[: num_axes + 2]
    for layout in [
        (f"NC{spatial}", f"OI{spatial}", f"NC{spatial}"),
        (f"{spatial}CN", f"I{spatial}O", f"C{spatial}N"),
    ]:
        axes = lax.conv_dimension_numbers(shape, (3,) * (num_axes + 2), layout)
        inputs = jax.random.normal(getkey(), shape)
        channels = shape[axes.lhs_spec[1]]
        kernel_shape = np.full(num_axes + 2, 3)
        kernel_shape[list(axes.rhs_spec[:2])] = 2, channels
        kernel = jax.random.normal(getkey(), kernel_shape)
        options = {"window_strides": range(1, num_axes + 1)}
        function = partial(convolve, layout=layout, **options)
        np.testing.assert_allclose(
            with_channels_last(function)(inputs, kernel), function(inputs, kernel), **ROUNDING
        )


def loss_in_a_loop(function, kernel, inputs):
    def body(total, row):
        return total + jnp.sum(function(row, kernel) ** 2), None

    return lax.scan(body, 0.0, inputs)[0]


WRAPPERS = {
    "scan": lambda function: partial(loss_in_a_loop, function),
    "checkpoint": lambda function: partial(loss_in_a_loop, jax.checkpoint(function)),
    "cond": lambda function: partial(
        loss_in_a_loop,
        lambda x, kernel: lax.cond(x.sum() > 0, function, lambda x, k: x[..., :1] * k.sum(), x, kernel),
    ),
    "jit": lambda function: partial(loss_in_a_loop, jax.jit(function)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_loops_on_a_cpu_hold_fast_convolutions_only(getkey, wrapper):
    gradient = jax.grad(WRAPPERS[wrapper](lambda x, kernel: convolve(x, kernel)[..., :1]))
    kernel, inputs = jnp.ones((3, 3, 4, 8)), jax.random.normal(getkey(), (5, 2, 6, 6, 4))

    def compiled(function):
        return jax.jit(function).lower(kernel, inputs).compile()

    def other_orders(program):
        lines = program.as_text().splitlines()
        return [line for line in lines if " convolution(" in line and "b01f_01io->b01f" not in line]

    before, after = compiled(gradient), compiled(with_channels_last(gradient))
    assert other_orders(before)
    assert not other_orders(after)
    np.testing.assert_allclose(after(kernel, inputs), before(kernel, inputs), **ROUNDING)
