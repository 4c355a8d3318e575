"""Takes blocks of arrays out, along some of their axes, and puts them back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

Kept = dict[str, Array]
"""By layer, the numbers of the blocks that are kept, in order."""


@dataclass(frozen=True)
class Cut:
    """How an axis is cut: over and over again into so many blocks of so many indices.

    Attributes:
        name: of the layer whose blocks these are.
        axis: which axis.
        num_blocks: of which some are kept.
        width: indices of a block.
    """

    name: str
    axis: int
    num_blocks: int
    width: int


MIN_RUN = 16
"""Neighbours in memory from which on, on a CPU, it is faster to write blocks one after another."""


def take(array: Array, cuts: Sequence[Cut], kept: Kept) -> Array:
    """The blocks that are kept, along all axes at once: nothing else is read."""
    if not cuts:
        return array
    shape, axes = _cut_shape(array.shape, cuts)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(axis for axis in range(len(shape)) if axis not in axes),
        collapsed_slice_dims=axes,
        start_index_map=axes,
    )
    window = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    parts = lax.gather(
        array.reshape(shape), _grid(cuts, kept), numbers, window, mode="clip", unique_indices=True
    )
    if _run(array.shape, cuts[-1]) < MIN_RUN:
        # Else the compiler lays it out by columns, and goes through the array column by column.
        parts = with_layout_constraint(parts, Layout(tuple(range(parts.ndim))))
    return parts.reshape(_kept_shape(array.shape, cuts, kept))


def put(array: Array, part: Array, cuts: Sequence[Cut], kept: Kept) -> Array:
    """The array with the blocks that are kept replaced by those of `part`."""
    if not cuts:
        return part
    first, *rest = cuts
    if rest and min(cut.width for cut in cuts) < MIN_RUN:
        part, cuts = put(take(array, [first], kept), part, rest, kept), [first]
    shape, axes = _cut_shape(array.shape, cuts)
    numbers = [len(kept[cut.name]) for cut in cuts]
    part_shape = list(shape)
    for axis, number in zip(axes, numbers, strict=True):
        part_shape[axis] = number
    part = part.reshape(part_shape)
    if _run(array.shape, cuts[-1]) >= MIN_RUN:
        dims = lax.ScatterDimensionNumbers(
            update_window_dims=tuple(axis for axis in range(len(shape)) if axis not in axes),
            inserted_window_dims=axes,
            scatter_dims_to_operand_dims=axes,
        )
        whole = lax.scatter(
            array.reshape(shape),
            _grid(cuts, kept),
            part,
            dims,
            mode="promise_in_bounds",
            unique_indices=True,
        )
        return whole.reshape(array.shape)
    (axis,), (number,) = axes, numbers
    numbered = jnp.arange(number, dtype=jnp.int32)
    place = jnp.zeros(first.num_blocks, jnp.int32).at[kept[first.name]].set(numbered)
    spread = jnp.take(part, place, axis=axis, mode="clip")
    chosen = is_kept(first, kept).reshape(-1, *(1,) * (len(shape) - axis - 1))
    return jnp.where(chosen, spread, array.reshape(shape)).reshape(array.shape)


def _cut_shape(
    shape: tuple[int, ...], cuts: Sequence[Cut]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape with each cut axis divided in three, and the axes of blocks."""
    by_axis = {cut.axis: cut for cut in cuts}
    divided: list[int] = []
    axes = []
    for axis, size in enumerate(shape):
        if axis in by_axis:
            cut = by_axis[axis]
            axes.append(len(divided) + 1)
            divided += [size // (cut.num_blocks * cut.width), cut.num_blocks, cut.width]
        else:
            divided.append(size)
    return tuple(divided), tuple(axes)


def _kept_shape(shape: tuple[int, ...], cuts: Sequence[Cut], kept: Kept) -> tuple[int, ...]:
    sizes = list(shape)
    for cut in cuts:
        sizes[cut.axis] = sizes[cut.axis] // cut.num_blocks * len(kept[cut.name])
    return tuple(sizes)


def _grid(cuts: Sequence[Cut], kept: Kept) -> Array:
    """Every combination of kept blocks along the axes, `[*blocks, axis]`."""
    return jnp.stack(jnp.meshgrid(*(kept[cut.name] for cut in cuts), indexing="ij"), -1)


def _run(shape: tuple[int, ...], cut: Cut) -> int:
    """How many neighbours in memory a block has along one axis."""
    return cut.width * math.prod(shape[cut.axis + 1 :])


def is_kept(cut: Cut, kept: Kept) -> Array:
    """By block, whether it is kept."""
    return jnp.zeros(cut.num_blocks, bool).at[kept[cut.name]].set(True)
