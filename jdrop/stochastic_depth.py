"""Stochastic depth: dropout of whole branches of a network, as pure functions of an explicit key.

`drop_path` drops the output of a branch. `drop_branch` does not compute what it drops. The
functions after `depth_linear_rates` serve the layers; they are not part of the API.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jdrop import bits, functional
from jdrop.annotations import Bool, Inexact

__all__ = ["depth_linear_rates", "drop_branch", "drop_path"]

INDEXING: Any = {"unique_indices": True, "mode": "promise_in_bounds"}
"""What is known of drawn samples; it saves the checks of each index."""


def drop_path(
    key: Array, x: ArrayLike, rate: ArrayLike, *, per_sample: bool = True, scale: bool = True
) -> Inexact[Array, "..."]:
    r"""Drops all elements of a sample together, with probability `rate`.

    $$y_i = \frac{m_i x_i}{q}, \qquad m_i \sim \mathrm{Bernoulli}(q), \qquad q = 1 - \mathrm{rate}$$

    In a residual network `x + drop_path(key, branch(x), rate)` drops the branch. It is `dropout`
    with `broadcast_dims` of all axes but the first, so `q`, rates and masks are those of `dropout`.
    The branch is computed for every sample; `drop_branch` leaves out those that are dropped.

    Args:
        key: one key; it is consumed, unless the rate is the scalar 0.
        x: float or complex, `[batch, ...]`; the output of a branch.
        rate: the probability to drop, as in `dropout`; an array must be broadcastable to
            `[batch, 1, ...]`.
        per_sample: whether each sample has its own decision. If not, one decision holds for all
            elements of `x`, whose first axis may then be any. Under `jax.vmap` over a batch,
            with a key for each sample, give `per_sample=False`.
        scale: whether to divide by `q`.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: an `x` without a batch axis; a rate out of range or of a shape that does not
            fit.
        TypeError: an integer or Boolean `x`; a key that is not a single key.

    Example:
        >>> y = drop_path(jax.random.key(0), jnp.ones((8, 2, 3)), 0.5)
        >>> bool(jnp.all((y == 0).all((1, 2)) | (y == 2).all((1, 2))))
        True

    Reference:
        Huang et al. 2016, arXiv:1603.09382, for a batch; Larsson et al. 2016, arXiv:1605.07648,
        for the name.
    """
    dims = shared_dims(jnp.ndim(x), per_sample)
    return functional.dropout(key, x, rate, broadcast_dims=dims, scale=scale)


def drop_branch(
    key: Array,
    branch: Callable[[Any], Array],
    x: Any,
    rate: ArrayLike,
    *,
    per_sample: bool = True,
    scale: bool = True,
) -> Inexact[Array, "..."]:
    r"""Computes a branch of a network without the samples that it drops.

    Each sample is kept with the probability $q$ of `dropout`, so the mean over masks is
    `branch(x)`. In a residual network `x + drop_branch(key, branch, x, rate)` drops the branch.

    With `per_sample` the number of kept samples is fixed: $qB$ of a batch of $B$, or one of its two
    neighbours if $qB$ is no integer. All sets of that size are equally probable. The branch sees
    $\lceil qB \rceil$ samples. Two samples are therefore not dropped independently: for two of 8
    samples and `rate=0.5`, both are dropped with probability 3/14, in `drop_path` with 1/4.

    Without `per_sample` the branch is computed for all samples or for none, by `jax.lax.cond`. The
    result equals `drop_path(key, branch(x), rate, per_sample=False)`. Under `jax.vmap` over keys,
    as in an ensemble, JAX computes both sides, so nothing is saved.

    Args:
        key: one key; it is consumed, unless the rate is the scalar 0.
        branch: `branch(x)` is a float or complex array. With `per_sample` it treats the samples
            alike and apart; batch normalisation sees the computed samples only. It may
            draw masks from another key. Without `per_sample` it must change no state of a Flax
            module; see `flax.linen.cond` and `flax.nnx.cond`.
        x: an array, or a pytree of arrays. With `per_sample` each array, and the output of the
            branch, is `[batch, ...]`. Of a batch that is sharded over devices, each of them
            computes all kept samples. In `jax.shard_map`, with a key for each device, each of them
            computes those it holds.
        rate: the probability to drop. A Python scalar in [0, 1). Without `per_sample` also a scalar
            array in [0, 1], which may be traced.
        per_sample: whether samples are dropped one by one, or the whole batch.
        scale: whether to divide by `q`. LayerDrop does not.

    Returns:
        Shape and dtype of `branch(x)`, 0 where dropped.

    Raises:
        ValueError: a rate out of range; arrays without a batch axis, or of different batches.
        TypeError: a rate that is no Python scalar, with `per_sample`; an integer or Boolean output
            of the branch; a key that is not a single key.

    Example:
        >>> def branch(x):
        ...     print("computes", x.shape)
        ...     return x + 1
        >>> y = drop_branch(jax.random.key(0), branch, jnp.ones((8, 2)), 0.25)
        computes (6, 2)
        >>> int((y != 0).all(1).sum())
        6

    Reference:
        Huang et al. 2016, arXiv:1603.09382; Fan et al. 2019, arXiv:1909.11556, for LayerDrop;
        Oquab et al. 2023, arXiv:2304.07193, section 5, for the samples left out.
    """
    rate = functional.check_rate(rate)
    if not per_sample:
        return _branch_of_batch(key, branch, x, rate, scale)
    if not isinstance(rate, float):
        raise TypeError(
            "rate must be a Python scalar, because the number of samples that are computed depends "
            "on it, got an array; give `per_sample=False`, or `drop_path(key, branch(x), rate)`."
        )
    batch = _batch_size(x)
    if functional.is_number(rate, 0):
        return branch(x)
    order, kept = _draw_samples(key, batch, rate)
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, x))
    # Every device computes the kept samples of the whole batch.
    rows = [leaf.at[order].get(out_sharding=_sharding(leaf, None), **INDEXING) for leaf in leaves]
    outputs = branch(jax.tree.unflatten(tree, rows))
    if jnp.ndim(outputs) == 0 or len(outputs) != len(order):
        raise ValueError(
            f"branch must return an array with the batch axis of its inputs, of size {len(order)}, "
            f"got the shape {jnp.shape(outputs)}; give `per_sample=False` for other branches."
        )
    kept = jax.lax.expand_dims(kept, range(1, outputs.ndim))
    outputs = functional.apply_mask(kept, outputs, rate, scale=scale)
    divided = _sharding(outputs, jax.typeof(leaves[0]).sharding.spec[0])
    zeros = jnp.zeros((batch, *outputs.shape[1:]), outputs.dtype, device=divided)
    return zeros.at[order].set(outputs, out_sharding=divided, **INDEXING)


def depth_linear_rates(rate: ArrayLike, num_layers: int) -> tuple[float, ...]:
    r"""The rates of layers that are dropped the more often the deeper they lie.

    $$\mathrm{rate}_l = \frac{l}{L - 1}\, \mathrm{rate}, \qquad l = 0, \dots, L - 1$$

    The first layer is never dropped, the last one with `rate`, as in timm, scenic and ConvNeXt. The
    paper starts one step later; its rates are `depth_linear_rates(rate, num_layers + 1)[1:]`.

    Args:
        rate: of the last layer, a Python scalar in [0, 1).
        num_layers: how many layers there are; a single one has `rate`.

    Returns:
        `num_layers` Python scalars. For a scan over layers, make an array of them.

    Raises:
        ValueError: a rate out of range; fewer than 1 layer.
        TypeError: a rate that is no Python scalar.

    Example:
        >>> depth_linear_rates(0.5, 3)
        (0.0, 0.25, 0.5)

    Reference:
        Huang et al. 2016, arXiv:1603.09382, equation 4.
    """
    last = functional.check_rate(rate)
    if not isinstance(last, float):
        raise TypeError(f"rate must be a Python scalar, got {type(rate).__name__}.")
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}.")
    if num_layers == 1:
        return (last,)
    return tuple(last * (layer / (num_layers - 1)) for layer in range(num_layers))


def shared_dims(ndim: int, per_sample: bool) -> tuple[int, ...]:
    """The `broadcast_dims` of a mask that drops samples, or the batch. Raises without an axis."""
    if per_sample and ndim == 0:
        raise ValueError(
            "x must have a batch axis, [batch, ...], got a scalar; give `per_sample=False` for one "
            "decision for all elements."
        )
    return tuple(range(int(per_sample), ndim))


def check_branch(branch: Any, per_sample: bool) -> None:
    """Raises if a layer is given a branch that it cannot leave out."""
    if branch is not None and not per_sample:
        raise ValueError(
            "branch needs per_sample=True, because leaving out a whole batch needs a conditional "
            "around modules; call `layer(branch(x))`, or write the conditional with "
            "`flax.linen.cond` or `flax.nnx.cond`."
        )


def return_computed(outputs: Array) -> Array:
    """The branch of a layer whose real branch is computed already, for all samples."""
    return outputs


def draw_fixed_count_mask(key: Array, shape: Sequence[int], rate: float) -> Bool[Array, "..."]:
    """The mask that `drop_branch` applies with `per_sample`.

    Args:
        key: one key; it is consumed.
        shape: `[batch, 1, ...]`.
        rate: a Python scalar in (0, 1).
    """
    order, kept = _draw_samples(key, shape[0], rate)
    mask = jnp.zeros(shape[0], bool).at[order].set(kept, **INDEXING)
    return mask.reshape(shape)


def _branch_of_batch(
    key: Array, branch: Callable[[Any], Array], x: Any, rate: functional.Rate, scale: bool
) -> Array:
    """`drop_branch` without `per_sample`."""
    if jnp.ndim(rate):
        raise ValueError(
            f"rate must be a scalar without per_sample, got an array of shape {jnp.shape(rate)}."
        )
    if functional.is_number(rate, 0):
        return branch(x)
    outputs = jax.eval_shape(branch, x)
    # The shape of the mask of `drop_path`, so that both make the same decision.
    kept = functional.draw_mask(key, (1,) * outputs.ndim, rate)

    def compute(x: Any) -> Array:
        return functional.apply_mask(jnp.asarray(True), branch(x), rate, scale=scale)

    def skip(x: Any) -> Array:
        return jnp.zeros_like(outputs)

    return jax.lax.cond(kept.reshape(()), compute, skip, x)


def _batch_size(x: Any) -> int:
    """The size of the first axis, which all arrays of `x` share."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            "x must hold arrays [batch, ...] with the same batch, got "
            f"{'the shapes ' if shapes else 'no array'}{', '.join(map(str, shapes))}; close the "
            "branch over arrays that have no batch axis."
        )
    size: int = shapes[0][0]
    return size


def _sharding(x: Array, batch_axis: Any) -> NamedSharding | None:
    """How explicit mesh axes divide `x`, with this one for its batch axis; None without them."""
    mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
    if AxisType.Explicit not in mesh.axis_types:
        return None
    return NamedSharding(mesh, PartitionSpec(batch_axis, *spec[1:]))


def _draw_samples(key: Array, batch: int, rate: float) -> tuple[Array, Array]:
    """Draws the samples to compute, and whether each is kept: all of them, or all but the last.

    The last one is kept with the probability that makes up the expected number of kept samples, so
    that each sample is kept with probability q, the same as in `dropout`.
    """
    order_key, last_key = jax.random.split(functional.as_key(key))
    count, remainder = divmod(int(bits.threshold(rate)) * batch, bits.LEVELS)
    size = count + (remainder > 0)
    order = jax.random.permutation(order_key, batch)[:size]
    kept = jnp.ones(size, bool)
    if remainder:
        last = functional.keep_mask(last_key, (), 1 - remainder / bits.LEVELS)
        kept = kept.at[-1].set(last)
    return order, kept
