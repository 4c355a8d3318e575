"""Dropout as pure functions of an explicit key.

`dropout` consists of two steps: `keep_mask` draws the mask, `apply_mask` applies it.
`scale_weights` makes the test weights of unscaled dropout. The functions after these four check
arguments and draw masks for the layers; they are not part of the API.
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
from jdrop.annotations import Bool, Inexact, Shape

__all__ = ["apply_mask", "dropout", "keep_mask", "scale_weights"]

Rate = float | Array
"""A checked rate: a Python scalar, which is known while tracing, or an array."""

MAX_SCALE_CHANGE = 2**-13
"""How far the scale of bfloat16 and 8-bit numbers may lie from 1 / q, as a share of 1 / q."""


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

    The mean over masks is `x`: `q` is the probability that the random bits realise, which differs
    from `1 - rate` by at most 2e-5, and the result is rounded to the dtype of `x` once. For
    bfloat16, 8-bit floats and a Python scalar, `1 / (1 - rate)` replaces `1 / q` if they differ by
    less than 1.3e-4 of it: products halfway between two numbers then round to even.

    The mask depends only on the key, the shape, the rate and `broadcast_dims`; not on the dtype,
    `jit`, `vmap`, `remat` or sharding (except for `vmap` over keys of JAX's generators `rbg` and
    `unsafe_rbg`). A Python scalar and an array of the same rate give different masks, because for
    instance 0.5 needs fewer random bits if it is known.

    `jax.export` takes `x` with a symbolic first axis. Another axis may be symbolic if elements
    share their decisions along it. With a constraint such as "s >= 32" any axis may be symbolic.

    Args:
        key: one key, such as `jax.random.key(0)`; it is consumed, unless the rate is the scalar 0.
        x: float or complex, any shape.
        rate: the probability to drop. A Python scalar in [0, 1); 0 returns `x` and draws nothing.
            Or an array in [0, 1], a scalar or broadcastable to `x`, for instance one rate per
            channel; it may be traced, so a new value needs no compilation. A traced rate out of
            range cannot raise: it makes the output NaN. The gradient with respect to the rate is
            zero.
        broadcast_dims: the axes along which elements share one decision; negative axes count from
            the end.
        scale: whether to divide by `q`. Without it the mean is `q * x`, as in the paper of 2012;
            `scale_weights` then makes the weights for the test.

    Returns:
        Shape and dtype of `x`. Dropped elements are 0, also where `x` is infinite or NaN.

    Raises:
        ValueError: a rate out of range or of a shape that does not fit; an axis of `broadcast_dims`
            that is out of range or repeated; a symbolic axis on which the bits depend.
        TypeError: an integer or Boolean `x`; a key that is not a single key; a rate that is not a
            number or a float array; `broadcast_dims` that is not a sequence.

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
    if is_number(rate, 0):
        return x
    key = as_key(key)
    if isinstance(rate, float):
        return _drop(key, x, None, rate, shape, scale)
    return _drop(key, x, rate, None, shape, scale)


def keep_mask(key: Array, shape: Sequence[int], rate: ArrayLike) -> Bool[Array, "..."]:
    """Draws a mask: True, kept, with probability `1 - rate`, independently for each element.

    `dropout(key, x, rate)` is `apply_mask(keep_mask(key, x.shape, rate), x, rate)`.

    Args:
        key: one key; it is consumed.
        shape: the shape of the mask.
        rate: as in `dropout`; an array must be broadcastable to `shape`. Where a traced rate is
            out of range, everything is kept.

    Raises:
        ValueError: a rate out of range or of a shape that does not fit; a negative size.
        TypeError: a key that is not a single key; a shape that is no sequence of integers.

    Example:
        >>> keep_mask(jax.random.key(0), (2, 3), 0.5).shape
        (2, 3)
    """
    rate = check_rate(rate)
    shape = _check_shape(shape)
    if is_number(rate, 0):
        return jnp.ones(shape, bool)
    return draw_mask(key, shape, rate)


def apply_mask(
    mask: Bool[ArrayLike, "..."], x: ArrayLike, rate: ArrayLike, *, scale: bool = True
) -> Inexact[Array, "..."]:
    """Applies a given mask: `where(mask, x / q, 0)`, with the `q` of `dropout`.

    Args:
        mask: True = kept; broadcastable to `x`.
        x: float or complex, any shape.
        rate: the rate of the mask, as in `dropout`; it determines the scale `1 / q`.
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

    In the paper of 2012, training multiplies units by the mask alone (`scale=False`). At test every
    unit is present, and its outgoing weights are multiplied by the probability `q` that it was
    kept. This function makes those weights. Networks trained with scaled dropout do not need it.

    Args:
        params: any pytree of arrays, for instance `variables["params"]`.
        rates: for each weight that reads dropped units, its path in `params`, joined by "/", and
            the rate of that dropout. Do not name biases: they read no unit. Rates of single units,
            `[units]`, belong to the input axis of a kernel `[..., in, out]`. For a weight of
            another layout, give rates with the axes of the weight.

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


def _check_shape(shape: Any) -> tuple[int, ...]:
    """Returns `shape` as a tuple. Raises if it is no sequence of sizes."""
    if isinstance(shape, int):
        raise TypeError(f"shape must be a sequence of sizes, got {shape}; give ({shape},).")
    if not isinstance(shape, Sequence) or not all(map(_is_integer, shape)):
        raise TypeError(
            f"shape must be a sequence of integer sizes, got {shape!r}; "
            "give for instance the `.shape` of an array."
        )
    if any(size < 0 for size in shape):
        raise ValueError(
            f"shape must have no negative size, got {tuple(shape)}; "
            "give for instance the `.shape` of an array."
        )
    return tuple(map(int, shape))


def _is_integer(size: Any) -> bool:
    return isinstance(size, numbers.Integral) and not isinstance(size, bool)


def as_key(key: Any) -> Array:
    """Returns `key` as a single typed key. Raises TypeError if it is none."""
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
    # A setting of JAX determines the generator of a legacy key, but not the cache of `jit`.
    return key if typed else jax.random.wrap_key_data(key)


def check_rate(rate: ArrayLike, *, allow_one: bool = False, name: str = "rate") -> Rate:
    """Returns `rate` as a Python float or an array; errors call it `name`.

    Raises if a Python scalar is outside [0, 1) ([0, 1] if `allow_one`), or if an array has values
    outside [0, 1]. Values of traced arrays are not checked.
    """
    if isinstance(rate, numbers.Real):
        value = float(rate)
        if not (0 <= value < 1 or (allow_one and value == 1)):
            allowed = "[0, 1]" if allow_one else "[0, 1)"
            raise ValueError(
                f"{name} must lie in {allowed}, got {value}. It is the probability to drop, "
                "not the one to keep."
            )
        return value
    if not isinstance(rate, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be a number or an array, got {type(rate).__name__}.")
    if not jnp.issubdtype(rate.dtype, jnp.floating):
        raise TypeError(f"{name} must be a float array, got {rate.dtype}.")
    if not isinstance(rate, jax.core.Tracer):
        values = np.asarray(rate, np.float64)
        wrong = values[~((values >= 0) & (values <= 1))]
        if wrong.size:
            raise ValueError(f"{name} must lie in [0, 1], got an array that holds {wrong[0]}.")
    return jax.lax.stop_gradient(jnp.asarray(rate))


def is_number(rate: Rate, value: int) -> bool:
    """Whether `rate`, as `check_rate` returns it, is the Python scalar `value`."""
    return isinstance(rate, float) and rate == value


def mask_shape(shape: Shape, broadcast_dims: Sequence[int]) -> Shape:
    """Returns `shape` with size 1 along `broadcast_dims`. Raises if these are no distinct axes."""
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


def expand(value: Any, name: str, shape: Shape, target: str) -> Any:
    """Returns `value` with leading axes of size 1 up to the rank of `shape`, or as a scalar.

    Raises ValueError if it is not broadcastable to `shape`, the shape of `target`.
    """
    if jnp.ndim(value) == 0:
        return value
    try:
        fits = jnp.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must be broadcastable to the shape {shape} of {target}, "
            f"got the shape {value.shape}."
        )
    return jax.lax.expand_dims(value, range(len(shape) - value.ndim))


# Compiled, because a checkpoint outside of `jit` is slow; inline, to leave no trace inside `jit`.
@partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _drop(
    key: Array,
    x: Array,
    traced_rate: Array | None,
    static_rate: float | None,
    shape: Shape,
    scale: bool,
) -> Array:
    """Draws a mask and applies it. The backward pass draws the mask again, so none is stored."""

    def drop(key: Array, x: Array) -> Array:
        return _draw_and_apply(key, x, traced_rate, static_rate, shape, scale)

    # The compiler may still keep the mask. Only a loop would keep one for each iteration, and loops
    # need no `prevent_cse`.
    return jax.checkpoint(drop, prevent_cse=False)(key, x)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _draw_and_apply(
    key: Array,
    x: Array,
    traced_rate: Array | None,
    static_rate: float | None,
    shape: Shape,
    scale: bool,
) -> Array:
    rate = traced_rate if static_rate is None else static_rate
    assert rate is not None
    return apply_mask(draw_mask(key, shape, rate, like=x), x, rate, scale=scale)


@_draw_and_apply.defjvp
def _differentiate(
    static_rate: float | None, shape: Shape, scale: bool, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    """The derivative that JAX would find, with a mask that is read as part of a gradient."""
    key, x, traced_rate = primals
    rate = traced_rate if static_rate is None else static_rate
    mask = draw_mask(key, shape, rate, like=x, differentiated=True)
    return apply_mask(mask, x, rate, scale=scale), apply_mask(mask, tangents[1], rate, scale=scale)


def draw_mask(
    key: Any,
    shape: Shape,
    rate: Rate,
    like: Array | None = None,
    *,
    differentiated: bool = False,
) -> Bool[Array, "..."]:
    """Draws a mask and shards it like the array to be masked.

    Args:
        key: one key; it is consumed.
        shape: the shape of the mask.
        rate: as `check_rate` returns it; not the scalar 0 or 1.
        like: the array to be masked; without it, the mask is replicated.
        differentiated: whether the mask is part of a gradient, which changes its reading alone.
    """
    key = as_key(key)
    thresholds = bits.threshold(expand(rate, "rate", shape, "the mask"))
    sharding = _mask_sharding(like, shape)
    return bits.draw_mask(key, shape, thresholds, sharding, differentiated=differentiated)


def _mask_sharding(x: Array | None, shape: Shape) -> NamedSharding | None:
    """The sharding of a mask for `x`: that of `x`, except along axes of size 1."""
    if x is None:
        mesh, spec = jax.sharding.get_abstract_mesh(), PartitionSpec(*[None] * len(shape))
    else:
        mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
        names = zip(shape, spec, strict=True)
        spec = PartitionSpec(*(None if size == 1 else name for size, name in names))
    return None if mesh.empty else NamedSharding(mesh, spec)


def _as_inexact(name: str, x: ArrayLike) -> Array:
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a float or complex array, got {type(x).__name__}; of a pytree, give "
            "each array alone."
        ) from error
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name} must be a float or complex array, got a key; the key goes first.")
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be a float or complex array, got {x.dtype}; convert it first, "
            f"for instance with `{name}.astype(jnp.float32)`."
        )
    return x


def _keep_prob(rate: Rate, x: Array) -> Any:
    """The probability that the bits realise, in a real dtype of at least float32.

    The scaling of `x` uses this dtype and rounds to the dtype of `x` once. NaN where a traced rate
    is out of range.
    """
    dtype = np.dtype(np.float64 if jnp.finfo(x.dtype).bits == 64 else np.float32)
    keep_prob = bits.threshold(rate).astype(dtype) / np.asarray(bits.LEVELS, dtype)
    if isinstance(rate, float):
        return keep_prob
    return jnp.where((rate >= 0) & (rate <= 1), keep_prob, math.nan)


def _scaled(x: Array, rate: Rate) -> Array:
    if isinstance(rate, float) and jnp.finfo(x.dtype).nmant < 10:
        # At rate 0.2 the bits realise 0.800003, so 1 / q lies just beside 1.25. It would round all
        # products halfway between two bfloat16 numbers in the same direction, and shift the mean by
        # 0.05 %. The number that was meant leaves these ties to the rounding to even.
        scale = 1 / (1 - rate) if rate < 1 else 1.0
        if abs(scale * _keep_prob(rate, x) - 1) < MAX_SCALE_CHANGE:
            return _times(x, np.float32(scale))
    keep_prob = _keep_prob(expand(rate, "rate", x.shape, "x"), x)
    xp = np if isinstance(rate, float) else jnp
    # At rate 1 nothing is kept; any finite scale then avoids NaN in the gradient.
    return _times(x, 1 / xp.where(keep_prob == 0, xp.ones_like(keep_prob), keep_prob))


def _times(x: Array, factor: Any) -> Array:
    """`x * factor` for a real factor, computed in the dtype of the factor, rounded once."""
    if jnp.iscomplexobj(x):
        # Not a product of complex numbers, in which an infinite x would give inf * 0, which is NaN.
        return jax.lax.complex(x.real * factor, x.imag * factor)
    return (x.astype(factor.dtype) * factor).astype(x.dtype)


def _poisoned(x: Array, rate: Rate) -> Array:
    """`x`, NaN where a traced rate is out of range."""
    if isinstance(rate, float):
        return x
    rate = expand(rate, "rate", x.shape, "x")
    return jnp.where((rate >= 0) & (rate <= 1), x, math.nan)
