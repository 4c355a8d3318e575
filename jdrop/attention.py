"""Dot-product attention with dropout of its weights, of which only blocks are ever in memory.

`jax.nn.dot_product_attention` has no dropout. The queries are taken in blocks of `QUERY_BLOCK`,
each against all keys; the backward pass computes a block's weights, and its mask, again.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jdrop import functional
from jdrop.annotations import Shaped

QUERY_BLOCK = 128
"""Queries in a block; a part of what a mask is, since each block has a key of its own."""


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
    r"""Attention whose weights are dropped: those of every example, head and query on their own.

    $$y = D\left(\mathrm{softmax}\left(s\, q k^\top + B\right)\right) v$$

    where $D$ is `jdrop.dropout`, $s$ the scale and $B$ the bias. All that is not dropout is as in
    `jax.nn.dot_product_attention`, and so are the letters of the shapes: B examples, T queries, S
    keys, N heads of the queries, K of the keys (N a multiple of K: grouped queries), H dimensions.

    Memory: of the weights, `[B, N, T, S]`, a block of `[B, N, 128, S]` at a time, in the backward
    pass too, which computes each block again; a bias or a mask of their size is copied once. The
    arrays may be sharded along examples and heads, not along queries.

    The result is exact, whatever the blocks; but the masks depend on them: that of the queries from
    128 i on is `jdrop.keep_mask(jax.random.fold_in(key, i), (B, N, 128, S), dropout_rate)`, with T
    in place of 128 where T is less.

    Args:
        key: one key; it is consumed. None is allowed where `dropout_rate` is the number 0.
        q: queries, `[B, T, N, H]` or `[T, N, H]`, float.
        k: keys, `[B, S, K, H]` or `[S, K, H]`, of the dtype of `q`.
        v: values, `[B, S, K, V]` or `[S, K, V]`, of the dtype of `q`.
        bias: added to the scaled products; broadcastable to `[B, N, T, S]`.
        mask: Boolean, True = may be attended to; broadcastable to `[B, N, T, S]`.
        dropout_rate: the probability to drop a weight, a number in [0, 1) or a scalar array, which
            may be traced. Kept weights are divided by the probability that they are kept.
        broadcast_dims: axes of `[B, N, T, S]` along which one decision is shared; (0, 1) is the
            default of Flax.
        scale: of the products; `1 / sqrt(H)` unless given.
        is_causal: whether query t attends to keys 0 to t only.
        query_seq_lengths: int32 `[B]`; the outputs of queries from there on are 0.
        key_value_seq_lengths: int32 `[B]`; keys from there on are not attended to.
        local_window_size: how many keys before and after its own place a query attends to, one
            number or two.
        precision: of the two products, as in `jax.lax.dot_general`.

    Returns:
        `[B, T, N, V]` or `[T, N, V]`, of the dtype of `q`. A query with no key to attend to
        attends to all alike.

    Raises:
        ValueError: shapes that do not fit; a rate out of range or not a scalar.
        TypeError: dtypes that differ; a mask that is not Boolean.

    Example:
        >>> q = k = v = jax.random.normal(jax.random.key(0), (2, 300, 4, 16))
        >>> y = dot_product_attention(jax.random.key(1), q, k, v, dropout_rate=0.1, is_causal=True)
        >>> y.shape
        (2, 300, 4, 16)

    Reference:
        Vaswani et al. 2017, arXiv:1706.03762; computed in blocks as in Rabe and Staats 2021,
        arXiv:2112.05682.
    """
    rate = functional.check_rate(dropout_rate)
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

    drops = not functional.is_static(rate, 0)
    if drops:
        key = functional.as_key(key)
    batch, length, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    groups = heads // kv_heads
    weights_shape = (batch, heads, length, keys)
    functional.mask_shape(weights_shape, broadcast_dims)
    one_mask_for_all_queries = 2 in [dim % 4 for dim in broadcast_dims]
    bias = _expanded("bias", bias, weights_shape)
    mask = _expanded("mask", mask, weights_shape)
    if mask is not None and mask.dtype != bool:
        raise TypeError(f"mask must be Boolean, got {mask.dtype}; make it so with `mask != 0`.")
    q_lengths = _checked_lengths("query_seq_lengths", query_seq_lengths, batch)
    kv_lengths = _checked_lengths("key_value_seq_lengths", key_value_seq_lengths, batch)
    scale = 1 / math.sqrt(width) if scale is None else scale
    window = _checked_window(local_window_size)
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    def attend(block: Any) -> Array:
        """The outputs `[B, block, N, V]` of a block of queries."""
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
        place = index * size + lax.broadcasted_iota(jnp.int32, (1, 1, size, 1), 2)
        other = lax.broadcasted_iota(jnp.int32, (1, 1, 1, keys), 3)
        if is_causal:
            allowed.append(other <= place)
        if window is not None:
            allowed += [other >= place - window[0], other <= place + window[1]]
        if q_lengths is not None:
            allowed.append(place < q_lengths)
        if kv_lengths is not None:
            allowed.append(other < kv_lengths)
        for condition in allowed:
            scores = jnp.where(condition, scores, -0.7 * float(jnp.finfo(jnp.float32).max))
        weights = jax.nn.softmax(scores)
        if drops:
            block_key = jax.random.fold_in(key, 0 if one_mask_for_all_queries else index)
            weights = functional.dropout(block_key, weights, rate, broadcast_dims=broadcast_dims)
        weights = weights.astype(q.dtype).reshape(batch, kv_heads, groups, size, keys)
        y = jnp.einsum("bkgts,bskv->btkgv", weights, v, precision=precision)
        y = y.reshape(batch, size, heads, v.shape[-1])
        return y if q_lengths is None else jnp.where(place.reshape(1, size, 1, 1) < q_lengths, y, 0)

    blocks = -(-length // QUERY_BLOCK)
    if blocks <= 1:
        return jax.checkpoint(attend)((0, q, bias, mask))

    def split(x: Array | None, axis: int) -> Array | None:
        """`x` in blocks of queries, along a new first axis."""
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
    """`dot_product_attention` with the arguments that Flax's layers give their `attention_fn`.

    The arguments are those of `flax.linen.dot_product_attention`, with any number of batch axes.
    If `deterministic`, nothing is dropped; with `broadcast_dropout`, all examples and heads share
    their decisions.

    Raises:
        ValueError: what needs the whole weights: `module`, by which they would be stored, and
            products of the layer's own.
    """
    if module is not None:
        raise ValueError(
            "sow_weights must be False, got True: the weights are never there in whole; "
            "to look at them use Flax's own attention_fn."
        )
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise ValueError(
            "qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls must be None; "
            "to use them take Flax's own attention_fn."
        )
    *lead, length, heads, _ = q.shape

    def one_batch_axis(x: Array) -> Array:
        if len(lead) <= 1:
            return x
        x = x.reshape((1,) * (3 - x.ndim) + x.shape)
        return jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(-1, *x.shape[-3:])

    dtype = jnp.result_type(q, k, v) if dtype is None else dtype
    q, k, v = (one_batch_axis(x.astype(dtype)) for x in (q, k, v))
    y = dot_product_attention(
        dropout_rng,
        q,
        k,
        v,
        None if bias is None else one_batch_axis(bias),
        None if mask is None else one_batch_axis(mask.astype(bool)),
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
                f"{name} must be [length, heads, width] or [batch, length, heads, width], as q, k "
                f"and v all are, got the shape {x.shape} beside that of q, {q.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be a float array, got {x.dtype}; convert it first, for instance with "
                f"`{name}.astype(jnp.float32)`."
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must be of the dtype of q, {q.dtype}; got {x.dtype}.")
    same_but_width = k.shape[:-1] == v.shape[:-1] and q.shape[:-3] == k.shape[:-3]
    if not same_but_width or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "q, k and v must be [B, T, N, H], [B, S, K, H] and [B, S, K, V], "
            f"got {q.shape}, {k.shape} and {v.shape}."
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"The heads of q must be a multiple of those of k and v, got {q.shape[-2]} and "
            f"{k.shape[-2]}."
        )


def _expanded(name: str, x: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """`x` with four axes, each 1 or as in `shape`."""
    if x is None:
        return None
    x = jnp.atleast_1d(jnp.asarray(x))
    return functional.expand(x, name, shape, "the attention weights")


def _checked_lengths(name: str, lengths: ArrayLike | None, batch: int) -> Array | None:
    """The lengths as `[B, 1, 1, 1]`."""
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape ({batch},), one for each example, got "
            f"{lengths.dtype} of shape {lengths.shape}."
        )
    return lengths.reshape(batch, 1, 1, 1)


def _checked_window(size: Any) -> tuple[int, int] | None:
    """How many keys before and after its own place a query attends to."""
    if size is None:
        return None
    sizes = size if isinstance(size, tuple) else (size, size)
    if len(sizes) != 2 or not all(isinstance(one, int) for one in sizes):
        raise ValueError(f"local_window_size must be an integer or two, got {size!r}.")
    return sizes
