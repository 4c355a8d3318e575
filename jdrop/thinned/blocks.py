"""Takes blocks of units out of arrays, and puts them back."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from jdrop.thinned.units import KeptBlocks, UnitAxis

MIN_RUN = 16
"""The fewest neighbours in memory that a CPU writes faster as one block than one by one."""


def take(array: Array, axes: Sequence[UnitAxis], kept: KeptBlocks) -> Array:
    """The kept blocks, along all axes at once; nothing else is read.

    Args:
        array: at full size.
        axes: the axes along which units lie.
        kept: the blocks that are kept.
    """
    if not axes:
        return array
    shape, block_axes = _divided_shape(array.shape, axes)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(axis for axis in range(len(shape)) if axis not in block_axes),
        collapsed_slice_dims=block_axes,
        start_index_map=block_axes,
    )
    window = tuple(1 if axis in block_axes else size for axis, size in enumerate(shape))
    blocks = lax.gather(
        array.reshape(shape), _grid(axes, kept), numbers, window, mode="clip", unique_indices=True
    )
    if _run(array.shape, axes[-1]) < MIN_RUN:
        # Otherwise the compiler lays the blocks out by columns, and reads them column by column.
        blocks = with_layout_constraint(blocks, Layout(tuple(range(blocks.ndim))))
    return blocks.reshape(_kept_shape(array.shape, axes, kept))


def put(array: Array, kept_array: Array, axes: Sequence[UnitAxis], kept: KeptBlocks) -> Array:
    """The array with its kept blocks replaced by those of `kept_array`.

    Args:
        array: at full size.
        kept_array: the kept blocks, of the shape that `take` returns.
        axes: the axes along which units lie.
        kept: the blocks that are kept.
    """
    if not axes:
        return kept_array
    first, *rest = axes
    if rest and min(axis.width for axis in axes) < MIN_RUN:
        kept_array = put(take(array, [first], kept), kept_array, rest, kept)
        axes = [first]
    shape, block_axes = _divided_shape(array.shape, axes)
    counts = [len(kept[axis.group.name]) for axis in axes]
    kept_shape = list(shape)
    for axis, count in zip(block_axes, counts, strict=True):
        kept_shape[axis] = count
    kept_array = kept_array.reshape(kept_shape)
    if _run(array.shape, axes[-1]) >= MIN_RUN:
        dims = lax.ScatterDimensionNumbers(
            update_window_dims=tuple(axis for axis in range(len(shape)) if axis not in block_axes),
            inserted_window_dims=block_axes,
            scatter_dims_to_operand_dims=block_axes,
        )
        whole = lax.scatter(
            array.reshape(shape),
            _grid(axes, kept),
            kept_array,
            dims,
            mode="promise_in_bounds",
            unique_indices=True,
        )
        return whole.reshape(array.shape)
    (block_axis,), (count,) = block_axes, counts
    indices, no_blocks = kept[first.group.name], jnp.zeros(first.num_blocks, jnp.int32)
    sources = no_blocks.at[indices].set(jnp.arange(count, dtype=jnp.int32))
    spread = jnp.take(kept_array, sources, axis=block_axis, mode="clip")
    is_kept = jnp.zeros(first.num_blocks, bool).at[indices].set(True)
    is_kept = is_kept.reshape(-1, *(1,) * (len(shape) - block_axis - 1))
    return jnp.where(is_kept, spread, array.reshape(shape)).reshape(array.shape)


def _divided_shape(
    shape: tuple[int, ...], axes: Sequence[UnitAxis]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape with each unit axis divided in repeats, blocks and indices, and the block axes."""
    unit_axes = {unit_axis.axis: unit_axis for unit_axis in axes}
    divided: list[int] = []
    block_axes = []
    for axis, size in enumerate(shape):
        if axis in unit_axes:
            num_blocks, width = unit_axes[axis].num_blocks, unit_axes[axis].width
            block_axes.append(len(divided) + 1)
            divided += [size // (num_blocks * width), num_blocks, width]
        else:
            divided.append(size)
    return tuple(divided), tuple(block_axes)


def _kept_shape(
    shape: tuple[int, ...], axes: Sequence[UnitAxis], kept: KeptBlocks
) -> tuple[int, ...]:
    sizes = list(shape)
    for axis in axes:
        sizes[axis.axis] = sizes[axis.axis] // axis.num_blocks * len(kept[axis.group.name])
    return tuple(sizes)


def _grid(axes: Sequence[UnitAxis], kept: KeptBlocks) -> Array:
    """Every combination of kept blocks along the axes, `[*blocks, axis]`."""
    return jnp.stack(jnp.meshgrid(*(kept[axis.group.name] for axis in axes), indexing="ij"), -1)


def _run(shape: tuple[int, ...], axis: UnitAxis) -> int:
    """How many neighbours in memory a block has along one axis."""
    return axis.width * math.prod(shape[axis.axis + 1 :])
