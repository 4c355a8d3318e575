"""Keeps the gradients of convolutions fast in loops on a CPU.

The gradients of a convolution are convolutions whose axes are in another order. The CPU compiler
has fast code for one order only, batch first and channels last. It brings convolutions into this
order, but not those inside a loop, such as `jax.lax.scan`: there a training step of a small CNN
took 6 times as long, and one of ResNet-20 took 12 times. So jdrop orders the axes itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.extend.core.primitives import conv_general_dilated_p

REWRITTEN = frozenset(
    ("checkpoint", "closed_call", "cond", "jit", "pjit", "remat", "remat2", "scan", "while")
)
"""The primitives whose inner jaxprs are rewritten too."""


def with_channels_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with every convolution in the order that is fast on a CPU.

    On other backends the convolutions stay as they are, and so they do outside of transformations
    such as `jax.jit`, where there are no loops of the compiler.

    Args:
        function: of pytrees of arrays, which returns a pytree of arrays.
    """

    def call(*arguments: Any) -> Any:
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            return function(*arguments)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        jaxpr = _rewrite(closed.jaxpr)
        outputs = eval_jaxpr(jaxpr, closed.consts, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return call


def has_convolution(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function of pytrees of arrays, or of their shapes and dtypes, convolves."""
    return _holds_convolution(jax.make_jaxpr(function)(*arguments))


def _holds_convolution(value: Any) -> bool:
    """Whether a jaxpr, or a parameter of an equation, holds a convolution."""
    if isinstance(value, ClosedJaxpr):
        value = value.jaxpr
    if isinstance(value, Jaxpr):
        return any(
            equation.primitive is conv_general_dilated_p
            or any(map(_holds_convolution, equation.params.values()))
            for equation in value.eqns
        )
    return type(value) is tuple and any(map(_holds_convolution, value))


def _rewrite(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr with its convolutions, and those of the loops and calls in it, rewritten."""
    return jaxpr.replace(eqns=[_rewrite_equation(equation) for equation in jaxpr.eqns])


def _rewrite_equation(equation: JaxprEqn) -> JaxprEqn:
    if equation.primitive is conv_general_dilated_p:
        return _rewrite_convolution(equation)
    if equation.primitive.name not in REWRITTEN:
        return equation

    def rewrite(value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return value.replace(jaxpr=_rewrite(value.jaxpr))
        if isinstance(value, Jaxpr):
            return _rewrite(value)
        return tuple(map(rewrite, value)) if type(value) is tuple else value

    return equation.replace(params={name: rewrite(v) for name, v in equation.params.items()})


def _rewrite_convolution(equation: JaxprEqn) -> JaxprEqn:
    """A call that transposes, convolves with channels last, and transposes back."""
    axes = equation.params["dimension_numbers"]
    ndim = len(axes.lhs_spec)
    # The specifications list batch and channels first, or output and input channels first.
    last = type(axes)(
        lhs_spec=(0, ndim - 1, *range(1, ndim - 1)),
        rhs_spec=(ndim - 1, ndim - 2, *range(ndim - 2)),
        out_spec=(0, ndim - 1, *range(1, ndim - 1)),
    )
    if axes == last:
        return equation

    def as_it_is(inputs: Array, kernel: Array) -> Array:
        return conv_general_dilated_p.bind(inputs, kernel, **equation.params)

    def channels_last(inputs: Array, kernel: Array) -> Array:
        inputs = _move_axes(inputs, axes.lhs_spec, last.lhs_spec)
        kernel = _move_axes(kernel, axes.rhs_spec, last.rhs_spec)
        params = {**equation.params, "dimension_numbers": last}
        outputs = conv_general_dilated_p.bind(inputs, kernel, **params)
        return _move_axes(outputs, last.out_spec, axes.out_spec)

    def convolve(inputs: Array, kernel: Array) -> Array:
        return jax.lax.platform_dependent(inputs, kernel, cpu=channels_last, default=as_it_is)

    # A single equation with the same inputs and outputs can stand in for the convolution.
    (call,) = jax.make_jaxpr(jax.jit(convolve))(*(atom.aval for atom in equation.invars)).eqns
    return call.replace(invars=equation.invars, outvars=equation.outvars)


def _move_axes(array: Array, source: tuple[int, ...], destination: tuple[int, ...]) -> Array:
    """Transposes, so that the axis `source[i]` becomes the axis `destination[i]`."""
    return jnp.moveaxis(array, source, destination)
