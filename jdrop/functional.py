"""Dropout as pure functions of an explicit key, and every check of their arguments.

`dropout` is two steps that can be had apart: `keep_mask` draws the mask, `apply_mask` applies it.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jdrop import bits
from jdrop.annotations import Bool, Inexact

Rate = float | Array
"""A checked rate: a Python number, known while tracing, or an array."""


def dropout(
    key: Array,
    x: ArrayLike,
    rate: ArrayLike,
    *,
    broadcast_dims: Sequence[int] = (),
    scale: bool = True,
) -> Inexact[Array, "..."]:
    r"""Drops each element of `x` with probability `rate`.

    $$y = \frac{m \odot x}{q}, \qquad m \sim \mathrm{Bernoulli}(q), \qquad q = 1 - \mathrm{rate}$$

    The mean over masks is `x`, for every dtype: `q` is the probability that the random bits
    realise (within 2e-5 of `1 - rate`), `1 / q` is a float32 (float64 for 64-bit `x`), and only
    the product is rounded to the dtype of `x`.
    The mask depends on the key, the shape, the rate and `broadcast_dims` alone; not on the dtype,
    nor on `jit`, `vmap`, `remat` or sharding. A number and an array of the same rate are two rates
    here: for a number such as 0.5 fewer random bits serve, and so the masks differ. (Under `vmap`
    over keys of JAX's generators `rbg` and `unsafe_rbg` the masks are others than in a loop.)

    Args:
        key: one key, such as `jax.random.key(0)`; it is consumed. At the rate 0, a number, it is
            not looked at.
        x: float or complex, any shape.
        rate: the probability to drop. A Python number in [0, 1), checked; 0 returns `x` and draws
            nothing. Or an array in [0, 1], a scalar or broadcastable to `x` (one rate per channel,
            say), which may be traced, so that its value can change without a compilation; a rate
            of 1 gives zeros. A traced rate out of range cannot raise: it makes the output NaN.
            The gradient with respect to the rate is zero.
        broadcast_dims: axes along which one decision is shared; negative axes count from the end.
        scale: whether to divide by `q`. Without it the mean is `q * x`, the form of the 2012
            paper; `scale_weights` then makes the weights for the test.

    Returns:
        Shape and dtype of `x`. Dropped places are 0, also where `x` is infinite or NaN.

    Raises:
        ValueError: a rate out of range or of a shape that does not fit; bad `broadcast_dims`.
        TypeError: an integer or Boolean `x`; a key that is not a single key.

    Example:
        >>> x = jnp.arange(1.0, 7.0)
        >>> y = dropout(jax.random.key(0), x, 0.5)
        >>> bool(jnp.all((y == 0) | (y == 2 * x)))
        True
        >>> bool(jnp.all(dropout(jax.random.key(0), x, 0.0) == x))
        True

    Reference:
        Hinton et al. 2012, arXiv:1207.0580; scaled in training as in Srivastava et al. 2014,
        section 10.
    """
    x = _as_inexact("x", x)
    rate = check_rate(rate)
    shape = mask_shape(x.shape, broadcast_dims)
    if is_static(rate, 0):
        return x
    return _draw_and_apply(key, x, rate, shape, scale)


def keep_mask(key: Array, shape: Sequence[int], rate: ArrayLike) -> Bool[Array, "..."]:
    """Draws a mask: True, kept, with probability `1 - rate`, independently for each element.

    `dropout(key, x, rate)` is `apply_mask(keep_mask(key, x.shape, rate), x, rate)`.

    Args:
        key: one key; it is consumed.
        shape: the shape of the mask.
        rate: as in `dropout`; an array must be broadcastable to `shape`. Where a traced rate is
            out of range, everything is kept.

    Raises:
        ValueError: a rate out of range or of a shape that does not fit.
        TypeError: a key that is not a single key.

    Example:
        >>> keep_mask(jax.random.key(0), (2, 3), 0.5).shape
        (2, 3)
    """
    rate = check_rate(rate)
    if isinstance(shape, int):
        raise TypeError(f"shape must be a sequence of sizes, got {shape}; give ({shape},).")
    shape = tuple(shape)
    if is_static(rate, 0):
        return jnp.ones(shape, bool)
    return _draw(key, shape, rate, x=None)


def apply_mask(
    mask: Bool[ArrayLike, "..."], x: ArrayLike, rate: ArrayLike, *, scale: bool = True
) -> Inexact[Array, "..."]:
    """Applies a mask that is given, not drawn: `where(mask, x / q, 0)`.

    Args:
        mask: True = kept; broadcastable to `x`.
        x: float or complex, any shape.
        rate: the rate that the mask was drawn with, as in `dropout`; it sets the scale `1 / q`.
        scale: whether to divide by `q`.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: a mask or a rate that is not broadcastable to `x`; a rate out of range.
        TypeError: an integer or Boolean `x`; a mask that is not Boolean.

    Example:
        >>> apply_mask(jnp.array([True, False]), jnp.ones((2, 2)), 0.5)
        Array([[2., 0.],
               [2., 0.]], dtype=float32)
    """
    x = _as_inexact("x", x)
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(
            f"mask must be Boolean (True = kept), got {mask.dtype}; make it so with `mask != 0`."
        )
    mask = expand(mask, "mask", x.shape, "x")
    rate = check_rate(rate)
    kept = _scaled(x, rate) if scale else _poisoned(x, rate)
    return jnp.where(mask, kept, jnp.zeros((), x.dtype))


def scale_weights(params: Any, rates: Mapping[str, ArrayLike]) -> Any:
    r"""The test weights of a network trained with unscaled dropout: $W_{test} = q W$.

    In the form of the 2012 paper, training multiplies by the mask alone (`scale=False`), and at
    test every unit is present, its outgoing weights multiplied by the probability `q` that it was
    kept. This function makes those weights. Networks trained with the scaled form need none.

    Args:
        params: any pytree of arrays, for instance `variables["params"]`.
        rates: for each weight that reads dropped units, its path in `params`, parts joined by
            "/", and the rate of that dropout. Biases are not named: they read no unit. Rates of
            single units, `[units]`, go to the last but one axis of a kernel `[..., in, out]`; rates
            of more axes are broadcast to the weight, as one of another form needs.

    Returns:
        `params` with the named leaves multiplied by `q`, the others as they were.

    Raises:
        ValueError: a path that `params` does not have; a rate out of range.

    Example:
        >>> params = {"Dense_1": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
        >>> scale_weights(params, {"Dense_1/kernel": 0.5})["Dense_1"]["kernel"][0]
        Array([0.5, 0.5], dtype=float32)

    Reference:
        Hinton et al. 2012, arXiv:1207.0580; Srivastava et al. 2014, section 4 and figure 2.
    """

    def name(path: Any) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/")

    paths = [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for named in rates:
        if named not in paths:
            raise ValueError(
                f"rates names the weight {named!r}, which params does not have; "
                f"it has {', '.join(sorted(paths))}."
            )

    def scaled(path: Any, leaf: ArrayLike) -> ArrayLike:
        if name(path) not in rates:
            return leaf
        weight = _as_inexact(name(path), leaf)
        rate = check_rate(rates[name(path)])
        if jnp.ndim(rate) == 1 and weight.ndim > 1:
            rate = jnp.asarray(rate)[:, None]
        rate = expand(rate, "rate", weight.shape, name(path))
        return _times(weight, _keep_prob(rate, weight))

    return jax.tree_util.tree_map_with_path(scaled, params)


def as_key(key: Any) -> Array:
    """A single typed key, or the error that `key` deserves."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    legacy = dtype == jnp.uint32
    if not (typed or legacy):
        raise TypeError(
            f"key must be a JAX random key, got {type(key).__name__}; "
            "make one with `jax.random.key(seed)`."
        )
    if jnp.ndim(key) != (0 if typed else 1):
        raise TypeError(
            f"key must be a single key, got an array of shape {jnp.shape(key)}; "
            "map over many keys with `jax.vmap`."
        )
    # What a legacy key means is a setting of jax, which compiled functions are not told of.
    return key if typed else jax.random.wrap_key_data(key)


def check_rate(rate: ArrayLike, *, allow_one: bool = False) -> Rate:
    """Returns `rate` as a Python float or an array, or raises the error that it deserves.

    A Python number must lie in [0, 1) (in [0, 1] if `allow_one`), the values of an array in
    [0, 1]. Values that are not known yet, being traced, are not checked.
    """
    if isinstance(rate, numbers.Real):
        value = float(rate)
        if not (0 <= value < 1 or (allow_one and value == 1)):
            allowed = "[0, 1]" if allow_one else "[0, 1)"
            raise ValueError(
                f"rate must lie in {allowed}, got {value}. It is the probability to drop, "
                "not the one to keep."
            )
        return value
    if not isinstance(rate, jax.Array | np.ndarray):
        raise TypeError(f"rate must be a number or an array, got {type(rate).__name__}.")
    if not jnp.issubdtype(rate.dtype, jnp.floating):
        raise TypeError(f"rate must be a float array, got {rate.dtype}.")
    if not isinstance(rate, jax.core.Tracer):
        values = np.asarray(rate, np.float64)
        wrong = values[~((values >= 0) & (values <= 1))]
        if wrong.size:
            raise ValueError(f"rate must lie in [0, 1], got an array that holds {wrong[0]}.")
    return jax.lax.stop_gradient(jnp.asarray(rate))


def is_static(rate: Rate, value: int) -> bool:
    """Whether `rate`, as `check_rate` returns it, is the Python number `value`."""
    return isinstance(rate, float) and rate == value


def mask_shape(shape: tuple[int, ...], broadcast_dims: Sequence[int]) -> tuple[int, ...]:
    """`shape` with 1 in place of each of `broadcast_dims`, which are checked."""
    if isinstance(broadcast_dims, int):
        raise TypeError(
            f"broadcast_dims must be a sequence of axes, got {broadcast_dims}; "
            f"for one axis give ({broadcast_dims},)."
        )
    ndim = len(shape)
    axes = []
    for dim in broadcast_dims:
        if not -ndim <= dim < ndim:
            raise ValueError(
                f"broadcast_dims must lie in [{-ndim}, {ndim}) for an array of shape {shape}, "
                f"got {dim}."
            )
        axes.append(dim % ndim)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"broadcast_dims must name each axis once, got {tuple(broadcast_dims)} "
            f"for an array of shape {shape}."
        )
    return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def expand(value: Any, name: str, shape: tuple[int, ...], of: str) -> Any:
    """`value` with axes of size 1 in front, so that it has the rank of `shape`; scalars stay."""
    if jnp.ndim(value) == 0:
        return value
    try:
        fits = np.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must be broadcastable to the shape {shape} of {of}, "
            f"got the shape {value.shape}."
        )
    return jax.lax.expand_dims(value, range(len(shape) - value.ndim))


def draw_and_apply(
    key: Array, x: ArrayLike, rate: ArrayLike, broadcast_dims: Sequence[int] = ()
) -> Inexact[Array, "..."]:
    """`dropout` for layers, which allow a rate of 1.

    The arguments, the result and the errors are those of `dropout`.
    """
    x = _as_inexact("x", x)
    rate = check_rate(rate, allow_one=True)
    return _draw_and_apply(key, x, rate, mask_shape(x.shape, broadcast_dims), scale=True)


def draw_mask_like(
    key: Array, x: Array, rate: ArrayLike, broadcast_dims: Sequence[int] = ()
) -> Bool[Array, "..."]:
    """The mask that `dropout` draws for these arguments, with 1 along `broadcast_dims`.

    Args:
        key: one key; it is consumed.
        x: the array to be masked: its shape is used, and its sharding where that is explicit.
        rate: as in `dropout`, and 1 is allowed.
        broadcast_dims: as in `dropout`.
    """
    rate = check_rate(rate, allow_one=True)
    return _draw(key, mask_shape(x.shape, broadcast_dims), rate, x)


def mask_of_call(given: Any, call: int) -> Array:
    """The mask that a layer uses at its call number `call` of a pass.

    Args:
        given: one mask, used at every call, or a tuple with one mask for each call of a pass.
        call: counted from 0, on through later passes.
    """
    return given[call % len(given)] if isinstance(given, tuple) else given


def _draw_and_apply(key: Any, x: Array, rate: Rate, shape: tuple[int, ...], scale: bool) -> Array:
    key = as_key(key)
    if isinstance(rate, float):
        return _drop(key, x, None, rate, shape, scale)
    return _drop(key, x, rate, None, shape, scale)


# Compiled, since a checkpoint outside of `jit` is slow; inline, so that within it nothing shows.
@partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _drop(
    key: Array,
    x: Array,
    traced_rate: Array | None,
    static_rate: float | None,
    shape: tuple[int, ...],
    scale: bool,
) -> Array:
    """Draws a mask and applies it; the backward pass draws it again, so nothing of it is kept."""
    rate = traced_rate if static_rate is None else static_rate
    assert rate is not None

    def drop(key: Array, x: Array) -> Array:
        return apply_mask(_draw(key, shape, rate, x), x, rate, scale=scale)

    # The compiler may still keep what it drew: only in a loop would that be a mask for each turn.
    return jax.checkpoint(drop, prevent_cse=False)(key, x)


def _draw(key: Any, shape: tuple[int, ...], rate: Rate, x: Array | None) -> Array:
    """Draws a mask of `shape`, sharded as `x` is."""
    key = as_key(key)
    thresholds = bits.threshold(expand(rate, "rate", shape, "the mask"))
    return bits.draw_mask(key, shape, thresholds, _mask_sharding(x, shape))


def _mask_sharding(x: Array | None, shape: tuple[int, ...]) -> NamedSharding | None:
    """The sharding of a mask for `x`: that of `x`, but for the axes along which it is 1."""
    if x is None:
        mesh, spec = jax.sharding.get_abstract_mesh(), PartitionSpec(*[None] * len(shape))
    else:
        mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
        names = zip(shape, spec, strict=True)
        spec = PartitionSpec(*(None if size == 1 else name for size, name in names))
    return None if mesh.empty else NamedSharding(mesh, spec)


def _as_inexact(name: str, x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name} must be a float or complex array, got a key; the key goes first.")
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be a float or complex array, got {x.dtype}; convert it first, "
            f"for instance with `{name}.astype(jnp.float32)`."
        )
    return x


def _keep_prob(rate: Rate, x: Array) -> Any:
    """The probability that the bits realise, in the dtype in which `x` is scaled.

    That dtype is real and at least float32, so that rounding to the dtype of `x` happens once.
    NaN where a traced rate is out of range.
    """
    dtype = np.dtype(np.float64 if jnp.finfo(x.dtype).bits == 64 else np.float32)
    keep_prob = bits.threshold(rate).astype(dtype) / np.asarray(bits.LEVELS, dtype)
    if isinstance(rate, float):
        return keep_prob
    return jnp.where((rate >= 0) & (rate <= 1), keep_prob, math.nan)


def _scaled(x: Array, rate: Rate) -> Array:
    keep_prob = _keep_prob(expand(rate, "rate", x.shape, "x"), x)
    xp = np if isinstance(rate, float) else jnp
    # At rate 1 nothing is kept, and any finite scale keeps the gradient from being NaN.
    return _times(x, 1 / xp.where(keep_prob == 0, xp.ones_like(keep_prob), keep_prob))


def _times(x: Array, factor: Any) -> Array:
    """`x * factor` for a real factor, computed in the dtype of the factor, rounded once."""
    if jnp.iscomplexobj(x):
        # Not as a product of complex numbers, in which inf * 0 would make NaN of an infinite x.
        return jax.lax.complex(x.real * factor, x.imag * factor)
    return (x.astype(factor.dtype) * factor).astype(x.dtype)


def _poisoned(x: Array, rate: Rate) -> Array:
    """`x`, NaN where a traced rate is out of range."""
    if isinstance(rate, float):
        return x
    rate = expand(rate, "rate", x.shape, "x")
    return jnp.where((rate >= 0) & (rate <= 1), x, math.nan)
