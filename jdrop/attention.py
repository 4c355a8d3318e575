"""Dot-product attention with dropout of its weights, which are computed block by block.

`jax.nn.dot_product_attention` has no dropout. Here each block of `QUERY_BLOCK` queries attends to
all keys. The backward pass computes the weights and the mask of a block again, so memory never
holds the weights of more than one block.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax
from jax.typing import ArrayLike

from jdrop import functional
from jdrop.annotations import Shape, Shaped

QUERY_BLOCK = 128
"""Queries in a block. Masks depend on it, since each block draws from a key of its own."""


def dot_product_attention(
    key: Any,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    dropout_rate: ArrayLike,
    broadcast_dims: Sequence[int] = (),
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    precision: Any = None,
) -> Shaped[Array, "..."]:
    r"""Attention with dropout of its weights, drawn for every example, head, query and key.

    $$y = D\left(\mathrm{softmax}\left(s\, q k^\top + B\right)\right) v$$

    where $D$ is `jdrop.dropout`, $s$ the scale and $B$ the bias. Apart from dropout the function
    and its arguments are those of `jax.nn.dot_product_attention`; it takes complex arrays too, as
    Flax's layers do. The shapes have B examples, T queries, S keys, N query heads, K key heads (N
    is a multiple of K) and H dimensions.

    Memory holds `[B, N, 128, S]` of the weights `[B, N, T, S]` at a time, in the backward pass
    too. A bias or a mask of their size is copied once. The arrays may be sharded along examples
    and heads, not along queries.

    The blocks change no result but the masks. Block `i` holds the queries from `128 * i` on. Its
    mask is `jdrop.keep_mask(jax.random.fold_in(key, i), (B, N, 128, S), dropout_rate)`. If T is
    less than 128, T takes the place of 128. Along `broadcast_dims` the mask has size 1. If queries
    share a mask, all blocks use `fold_in(key, 0)`.

    Args:
        key: a single key; it is consumed. May be None if `dropout_rate` is the Python scalar 0.
        q: queries, `[B, T, N, H]` or `[T, N, H]`, float or complex.
        k: keys, `[B, S, K, H]` or `[S, K, H]`, of the dtype of `q`.
        v: values, `[B, S, K, V]` or `[S, K, V]`, of the dtype of `q`.
        bias: added to the scaled products; broadcastable to `[B, N, T, S]`.
        mask: Boolean, True lets the query attend to the key; broadcastable to `[B, N, T, S]`.
        dropout_rate: the probability to drop a weight: a Python scalar in [0, 1), or a scalar
            array, which may be traced. Kept weights are divided by their probability to be kept.
        broadcast_dims: axes of `[B, N, T, S]` along which all weights share a decision. Flax's
            default is (0, 1).
        scale: factor of the products `q k^T`; `1 / sqrt(H)` by default.
        is_causal: whether query t attends to keys 0 to t only.
        query_seq_lengths: int32 `[B]`; the outputs of queries from this index on are 0.
        key_value_seq_lengths: int32 `[B]`; keys from this index on receive no attention.
        local_window_size: how many keys before and after its own index a query attends to, as an
            integer or a tuple of two integers.
        precision: precision of the two products, as in `jax.lax.dot_general`.

    Returns:
        `[B, T, N, V]` or `[T, N, V]`, of the dtype of `q`. A query that may attend to no key
        attends to all keys equally.

    Raises:
        ValueError: if shapes do not match, if the rate is out of range or not a scalar, or if
            dropout is on and T is symbolic, in an export with `jax.export`.
        TypeError: if dtypes differ, or if the mask is not Boolean.

    Example:
        >>> q = k = v = jax.random.normal(jax.random.key(0), (2, 300, 4, 16))
        >>> y = dot_product_attention(jax.random.key(1), q, k, v, dropout_rate=0.1, is_causal=True)
        >>> y.shape
        (2, 300, 4, 16)

    Reference:
        Vaswani et al. 2017, arXiv:1706.03762, for attention; Rabe and Staats 2021,
        arXiv:2112.05682, for the blocks.
    """
    rate = functional.check_rate(dropout_rate, name="dropout_rate")
    if np.ndim(rate):
        raise ValueError(f"dropout_rate must be a scalar, got an array of shape {jnp.shape(rate)}.")
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    _check_inputs(q, k, v)
    if q.ndim == 3:
        y = dot_product_attention(
            key, q[None], k[None], v[None], bias, mask, dropout_rate=rate,
            broadcast_dims=broadcast_dims, scale=scale, is_causal=is_causal,
            query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size, precision=precision,
        )  # fmt: skip
        return y[0]

    drops = not functional.is_number(rate, 0)
    batch, length, heads, width = q.shape
    if drops:
        key = functional.as_key(key)
        if export.is_symbolic_dim(length):
            raise ValueError(
                f"the length of q must be a number while dropout is on, got the symbolic {length}: "
                "masks depend on it; export with a length, or with dropout_rate=0.0."
            )
    keys, kv_heads = k.shape[1:3]
    groups = heads // kv_heads
    weights_shape = (batch, heads, length, keys)
    functional.mask_shape(weights_shape, broadcast_dims)
    queries_share_a_mask = 2 in [dim % 4 for dim in broadcast_dims]
    bias = _expanded("bias", bias, weights_shape)
    mask = _expanded("mask", mask, weights_shape)
    if mask is not None and mask.dtype != bool:
        raise TypeError(f"mask must be Boolean, got {mask.dtype}; convert it with `mask != 0`.")
    q_lengths = _checked_lengths("query_seq_lengths", query_seq_lengths, batch)
    kv_lengths = _checked_lengths("key_value_seq_lengths", key_value_seq_lengths, batch)
    scale = 1 / math.sqrt(width) if scale is None else scale
    window = _checked_window(local_window_size)
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    def attend(block: Any) -> Array:
        """Computes the outputs `[B, size, N, V]` of a block of queries."""
        index, q, bias, mask = block
        size = q.shape[1]
        grouped = q.reshape(batch, size, kv_heads, groups, width)
        scores = jnp.einsum(
            "btkgh,bskh->bkgts", grouped, k, precision=precision, preferred_element_type=dtype
        )
        scores = scale * scores.reshape(batch, heads, size, keys)
        if bias is not None:
            scores = (scores + bias).astype(dtype)
        allowed = [] if mask is None else [mask]
        query_index = index * size + lax.broadcasted_iota(jnp.int32, (1, 1, size, 1), 2)
        key_index = lax.broadcasted_iota(jnp.int32, (1, 1, 1, keys), 3)
        if is_causal:
            allowed.append(key_index <= query_index)
        if window is not None:
            before, after = window
            allowed += [key_index >= query_index - before, key_index <= query_index + after]
        if q_lengths is not None:
            allowed.append(query_index < q_lengths)
        if kv_lengths is not None:
            allowed.append(key_index < kv_lengths)
        for condition in allowed:
            scores = jnp.where(condition, scores, -0.7 * float(jnp.finfo(jnp.float32).max))
        weights = jax.nn.softmax(scores)
        if drops:
            block_key = jax.random.fold_in(key, 0 if queries_share_a_mask else index)
            weights = functional.dropout(block_key, weights, rate, broadcast_dims=broadcast_dims)
        weights = weights.astype(q.dtype).reshape(batch, kv_heads, groups, size, keys)
        y = jnp.einsum("bkgts,bskv->btkgv", weights, v, precision=precision)
        y = y.reshape(batch, size, heads, v.shape[-1])
        if q_lengths is None:
            return y
        return jnp.where(query_index.reshape(1, size, 1, 1) < q_lengths, y, 0)

    if not export.is_symbolic_dim(length) and length <= QUERY_BLOCK:
        return jax.checkpoint(attend)((0, q, bias, mask))
    blocks = -(-length // QUERY_BLOCK)

    def split(x: Array | None, axis: int) -> Array | None:
        """Splits `x` into blocks of queries, along a new first axis."""
        if x is None:
            return None
        if x.shape[axis] == 1:
            return jnp.broadcast_to(x, (blocks, *x.shape))
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * QUERY_BLOCK - length)
        shape = (*x.shape[:axis], blocks, QUERY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, padding).reshape(shape), axis, 0)

    inputs = (jnp.arange(blocks), split(q, 1), split(bias, 2), split(mask, 2))
    y = jnp.moveaxis(lax.map(jax.checkpoint(attend), inputs), 0, 1)
    return y.reshape(batch, blocks * QUERY_BLOCK, heads, v.shape[-1])[:, :length]


def for_flax(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = False,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
) -> Array:
    """`dot_product_attention` with the arguments that Flax's layers pass to their `attention_fn`.

    The arguments are those of `flax.linen.dot_product_attention`, with any number of batch axes.
    With `deterministic` no weight is dropped. With `broadcast_dropout` all examples and heads share
    their decisions.

    Raises:
        ValueError: if an argument needs all weights at once: `module`, which would store them, or
            the layer's own einsums.
    """
    if module is not None:
        raise ValueError(
            "sow_weights must be False, got True: jdrop's attention never holds all weights; "
            "to store them use Flax's own attention_fn."
        )
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise ValueError(
            "qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls must be None; "
            "to use them pass Flax's own attention_fn."
        )
    *lead, length, heads, _ = q.shape

    def merge_batch_axes(x: Array) -> Array:
        if len(lead) <= 1:
            return x
        x = x.reshape((1,) * (3 - x.ndim) + x.shape)
        return jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(-1, *x.shape[-3:])

    dtype = jnp.result_type(q, k, v) if dtype is None else dtype
    q, k, v = (merge_batch_axes(x.astype(dtype)) for x in (q, k, v))
    y = dot_product_attention(
        dropout_rng,
        q,
        k,
        v,
        None if bias is None else merge_batch_axes(bias),
        None if mask is None else merge_batch_axes(mask.astype(bool)),
        dropout_rate=0.0 if deterministic else dropout_rate,
        broadcast_dims=(0, 1) if broadcast_dropout else (),
        is_causal=is_causal,
        precision=precision,
    )
    return y.reshape(*lead, length, heads, y.shape[-1])


def _check_inputs(q: Array, k: Array, v: Array) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.ndim not in (3, 4) or x.ndim != q.ndim:
            raise ValueError(
                "q, k and v must all be [length, heads, width] or all be [batch, length, heads, "
                f"width], got q of shape {q.shape} and {name} of shape {x.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(
                f"{name} must be a float or complex array, got {x.dtype}; convert it, for instance "
                f"with `{name}.astype(jnp.float32)`."
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}.")
    same_but_width = k.shape[:-1] == v.shape[:-1] and q.shape[:-3] == k.shape[:-3]
    if not same_but_width or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "q, k and v must be [B, T, N, H], [B, S, K, H] and [B, S, K, V], "
            f"got {q.shape}, {k.shape} and {v.shape}."
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            "The number of heads of q must be a multiple of the number of heads of k and v, got "
            f"{q.shape[-2]} and {k.shape[-2]}."
        )


def _expanded(name: str, x: ArrayLike | None, shape: Shape) -> Array | None:
    """Returns `x` with four axes, each of size 1 or of the size in `shape`."""
    if x is None:
        return None
    x = jnp.atleast_1d(jnp.asarray(x))
    return functional.expand(x, name, shape, "the attention weights")


def _checked_lengths(name: str, lengths: ArrayLike | None, batch: Any) -> Array | None:
    """Returns the lengths as `[B, 1, 1, 1]`. Raises if they are not integers `[B]`."""
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape ({batch},), a length for each example, got "
            f"{lengths.dtype} of shape {lengths.shape}."
        )
    return lengths.reshape(batch, 1, 1, 1)


def _checked_window(size: Any) -> tuple[int, int] | None:
    """How many keys before and after its own index a query attends to."""
    if size is None:
        return None
    before_and_after = size if isinstance(size, tuple) else (size, size)
    if len(before_and_after) != 2 or not all(isinstance(n, int) for n in before_and_after):
        raise ValueError(
            f"local_window_size must be an integer or a tuple of two integers, got {size!r}."
        )
    return before_and_after
