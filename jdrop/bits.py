"""Random bits of a key, turned into keep decisions; the only module that draws bits for a mask.

A *group* is 32 neighbouring rows of a mask `[..., rows, columns]`. For each column, a *word* of 32
bits decides them:

              column 0    column 1    ...
    row  0    bit  0      bit  0             A word, drawn and stored once,
    row  1    bit  1      bit  1             takes a 32nd of the memory of
    ...                                      32-bit integers for all elements.
    row 31    bit 31      bit 31
    row 32    bit  0      bit  0             The next group, and its words.

A word is made of up to 16 random words by bitwise operations (`_decide`), which keep an element
with probability `threshold / 2**16` exactly. A mean-preserving scale must divide by that, not by
`1 - rate`. Fewer random words serve where they give the same probability: one for a rate of 1/2.

`jax.random.bits` hashes a pair of random words for each element. Here a pair decides 4 elements, or
8, 16 or 32 with up to 8, 4 or 2 bits. The hash is JAX's, threefry2x32 with 20 rounds.

A mask depends on the key, the shape and the thresholds alone (`_layout`): not on `jit`, `vmap`,
`scan`, `remat`, the backend or the sharding. The exception is `vmap` over keys of JAX's generators
`rbg` and `unsafe_rbg`, whose bits depend on the other keys. Devices exchange no bits. A device
draws its own columns, and its own rows if all devices have whole groups; otherwise all rows.

Masks of 1 and of 16 random bits per element, drawn as in training, pass the batteries Rabbit and
Alphabit of TestU01: 114 p-values from 0.0126 to 0.9962 (`scripts/randomness.py --log2-bits 28`).
The tests in `tests/test_randomness.py` read words, columns, groups, related keys and masks of a
training run.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jdrop.annotations import Bool, Shape, UInt32

LEVELS = 2**16

GROUP = 32
"""Rows that a word decides."""

VECTOR_COLUMNS = 128
"""Columns of the rows into which a mask with a single axis is divided."""

MAX_SELECTED_GROUPS = 32
"""The most groups among which a TPU selects; estimated from counted operations, not timed."""

ALL_ONES = np.uint32(0xFFFFFFFF)


def threshold(rate: float | Array) -> UInt32[Array | np.ndarray, "..."]:
    """How many of the `LEVELS` equally probable values of an element's bits keep the element.

    The threshold is `round((1 - rate) * LEVELS)`. It is at least 1 for every rate below 1, so that
    a mean-preserving scale exists. For a rate that is NaN or outside [0, 1] it is `LEVELS`, which
    keeps everything.

    Args:
        rate: the probability to drop, any shape, float.

    Returns:
        Thresholds from 0 to `LEVELS`, of the shape of `rate`.
    """
    # NumPy computes a Python float now, in the float32 arithmetic that a traced rate gets.
    xp: Any = np if isinstance(rate, float) else jnp
    kept_levels = xp.round((1 - xp.asarray(rate, np.float32)) * LEVELS)
    # The comparison reads the rate itself: rounded to float32, a rate just below 1 may become 1.
    kept_levels = xp.where(rate < 1, xp.maximum(kept_levels, 1), 0)
    in_range = (rate >= 0) & (rate <= 1)
    return xp.where(in_range, kept_levels, LEVELS).astype(np.uint32)


def draw_mask(
    key: Array,
    shape: Shape,
    thresholds: UInt32[Array | np.ndarray, "..."],
    sharding: NamedSharding | None,
    *,
    differentiated: bool = False,
) -> Bool[Array, "..."]:
    """Draws a mask whose elements are True, that is kept, with probability `threshold / LEVELS`.

    Args:
        key: a single typed key; it is consumed.
        shape: the shape of the mask.
        thresholds: the result of `threshold`: a scalar, or an array of the rank of `shape` that
            broadcasts to `shape`.
        sharding: the mesh, and how its explicit axes divide the mask; None without a mesh. The
            compiler chooses the division along all other mesh axes.
        differentiated: whether the mask is part of a gradient. It changes no mask, but how a TPU
            reads it.

    Raises:
        ValueError: an axis of symbolic size on which the layout depends.
    """
    traced = thresholds if isinstance(thresholds, jax.Array) else None
    known = int(thresholds) if traced is None else None
    draw = partial(
        _draw_decisions, shape=shape, known_threshold=known, differentiated=differentiated
    )
    if sharding is None:
        return draw(key, traced, mesh=None)
    mesh = sharding.mesh.abstract_mesh
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, axis_type in axes if axis_type == AxisType.Explicit)
    draw = partial(draw, mesh=mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto)))
    if explicit:
        draw = jax.sharding.auto_axes(draw, axes=explicit, out_sharding=sharding)
    return draw(key, traced)


class _Layout(NamedTuple):
    """How the axes of a mask become `[*lead, num_rows, columns]`.

    Attributes:
        axes: the axes of the mask, without those of size 1 after the first.
        lead: the sizes of the leading ones. Each of their indices has groups of its own.
        rows: the sizes of those that are merged into rows.
        columns: the size of the last one.
    """

    axes: tuple[int, ...]
    lead: Shape
    rows: Shape
    columns: Any

    @property
    def num_rows(self) -> Any:
        """The rows of each index of the leading axes."""
        return math.prod(self.rows)

    @property
    def num_groups(self) -> Any:
        """The groups of these rows; the last group may be partly unused."""
        return -(-self.num_rows // GROUP)

    @property
    def is_vector(self) -> bool:
        """Whether the mask has a single axis, which is divided into rows."""
        return len(self.axes) < 2


def _layout(shape: Shape) -> _Layout:
    """Merges the axes before the last, from the right, until they make a group of rows.

    Raises:
        ValueError: a symbolic size that decides about this.
    """
    try:
        axes = tuple(axis for axis, size in enumerate(shape) if not axis or not size or size > 1)
        sizes = [shape[axis] for axis in axes]
        if len(sizes) < 2:
            return _Layout(axes, (), (-(-math.prod(sizes) // VECTOR_COLUMNS),), VECTOR_COLUMNS)
        *lead, columns = sizes
        rows = [lead.pop()]
        while lead and math.prod(rows) < GROUP:
            rows.insert(0, lead.pop())
    except jax.errors.InconclusiveDimensionOperation:
        raise ValueError(
            f"a mask of the shape {shape} cannot be drawn: its bits depend on whether a symbolic "
            f"size after the first is 1, or less than {GROUP}; export with numbers for these "
            "sizes, with a constraint, such as `jax.export.symbolic_shape('b, s', "
            f"constraints=['s >= {GROUP}'])`, or without dropout."
        ) from None
    return _Layout(axes, tuple(lead), tuple(rows), columns)


@partial(
    jax.jit,
    static_argnames=("shape", "known_threshold", "differentiated", "mesh"),
    inline=True,
)
def _draw_decisions(
    key: Array,
    thresholds: Array | None,
    shape: Shape,
    known_threshold: int | None,
    differentiated: bool,
    mesh: AbstractMesh | None,
) -> Bool[Array, "..."]:
    layout = _layout(shape)
    digits: Sequence[bool | Array]
    if known_threshold is not None:
        digits = _known_digits(known_threshold)
    else:
        digits = _digits(_grouped_thresholds(thresholds, layout, shape))
    words = _draw_words(key, layout, digits)
    mask = _read_words(words, layout, shape, differentiated)
    if mesh is not None and AxisType.Auto in mesh.axis_types:
        mask = _draw_on_each_device(mask, layout, mesh)
    return mask


def _known_digits(threshold: int) -> list[bool]:
    """The binary digits of a threshold up to the 17th, from the lowest that is 1 or the 16th."""
    lowest = next(k for k in range(16) if threshold >> k & 1 or k == 15)
    return [bool(threshold >> k & 1) for k in range(lowest, 17)]


def _grouped_thresholds(thresholds: Any, layout: _Layout, shape: Shape) -> Array:
    """Thresholds as `[*lead, groups, GROUP, columns]`, or 1 where all have the same threshold."""
    if thresholds.size == 1:
        return thresholds.reshape([1] * (len(layout.lead) + 3))
    if layout.is_vector:
        thresholds = thresholds.reshape(-1)
        padding = layout.num_groups * GROUP * VECTOR_COLUMNS - thresholds.size
        return jnp.pad(thresholds, (0, padding)).reshape(-1, GROUP, VECTOR_COLUMNS)
    unit_axes = sorted(set(range(len(shape))) - set(layout.axes))
    thresholds = lax.squeeze(thresholds, unit_axes)
    lead, columns = thresholds.shape[: len(layout.lead)], thresholds.shape[-1]
    if math.prod(thresholds.shape[len(layout.lead) : -1]) == 1:
        return thresholds.reshape(*lead, 1, 1, columns)
    rows = jnp.broadcast_to(thresholds, (*lead, *layout.rows, columns))
    rows = rows.reshape(*lead, layout.num_rows, columns)
    padding = [(0, 0)] * rows.ndim
    padding[-2] = (0, layout.num_groups * GROUP - layout.num_rows)
    return jnp.pad(rows, padding).reshape(*lead, layout.num_groups, GROUP, columns)


def _digits(thresholds: Array) -> list[Array]:
    """The 17 binary digits of grouped thresholds, from the lowest, as words: bit r is of row r."""
    axis = thresholds.ndim - 2
    row = lax.broadcasted_iota(np.uint32, [*[1] * axis, GROUP, 1], axis)
    digits = []
    for k in range(17):
        bits = (thresholds >> np.uint32(k)) & np.uint32(1)
        if thresholds.shape[axis] == 1:
            # All ones for a 1.
            digits.append(-lax.squeeze(bits, [axis]))
        else:
            digits.append(lax.reduce(bits << row, np.uint32(0), lax.bitwise_or, [axis]))
    return digits


def _draw_words(key: Array, layout: _Layout, digits: Sequence[bool | Array]) -> Array:
    """Draws the words, `[*lead, groups, columns]`, whose bit r is the decision for row r.

    For a word of group g and column c, the pair of its part p is the hash of `g` and
    `num_parts * c + p`.
    """
    num_bits = len(digits) - 1
    shape = (*layout.lead, layout.num_groups, layout.columns)
    if jax.random.key_impl(key) != "threefry2x32":
        return _store(_decide(jax.random.bits(key, (num_bits, *shape), np.uint32), digits))
    if num_bits <= 2:
        pair = _hash_pairs(key, shape, np.uint32(0), 1)
        return _store(_decide([word[0] for word in pair[:num_bits]], digits))
    # A pair of random words makes a part of a word: 16 bits for each of 4 rows, for instance.
    part_rows = next(rows for rows in (16, 8, 4) if rows * num_bits <= 64)
    num_parts = GROUP // part_rows
    used_parts = num_parts
    if not export.is_symbolic_dim(layout.num_rows):
        used_parts = min(num_parts, max(2, -(-layout.num_rows // part_rows)))
    part = lax.broadcasted_iota(np.uint32, [used_parts] + [1] * len(shape), 0)
    first_row = part * np.uint32(part_rows)
    pair = _hash_pairs(key, shape, part, num_parts)
    planes = [word >> np.uint32(shift) for word in pair for shift in range(0, 32, part_rows)]
    decisions = _decide(
        planes[:num_bits], [d if isinstance(d, bool) else d[None] >> first_row for d in digits]
    )
    words = _join(decisions << first_row, np.uint32(2**part_rows - 1) << first_row)
    return lax.optimization_barrier(words)


def _hash_pairs(key: Array, shape: Shape, part: Any, num_parts: int) -> tuple[Array, Array]:
    """Hashes a pair of random words for each part of each word, `[parts, *shape]`."""
    if jax.config.jax_debug_key_reuse:  # type: ignore[attr-defined]
        # Marks the key as consumed, which reading its data does not.
        jax.random.bits(key, ())
    first_key, second_key = jax.random.key_data(key)
    group = lax.iota(np.uint32, math.prod(shape[:-1])).reshape(1, *shape[:-1], 1)
    column_shape = (*[1] * len(shape), shape[-1])
    column = lax.broadcasted_iota(np.uint32, column_shape, len(shape))
    return _threefry2x32(first_key, second_key, group, column * np.uint32(num_parts) + part)


def _store(words: Array) -> Array:
    """Returns the words, and keeps the compiler from drawing them again for each row."""

    def join_halves(words: Array) -> Array:
        first_row = lax.broadcasted_iota(np.uint32, [2] + [1] * words.ndim, 0) * np.uint32(16)
        return _join(words[None], np.uint32(0xFFFF) << first_row)

    return lax.platform_dependent(words, cpu=join_halves, default=lax.optimization_barrier)


def _join(parts: Array, bits_of_part: Array) -> Array:
    """Joins the parts of words, `[parts, ...]`. On a CPU, only reductions are always stored."""
    return lax.reduce(parts & bits_of_part, np.uint32(0), lax.bitwise_or, [0])


def _decide(planes: Sequence[Array] | Array, digits: Sequence[bool | Array]) -> Array:
    """Compares random bits with thresholds, for each position of a word: 1 where it is kept.

    A bit of a plane is 1 with probability 1/2. So `plane & kept` has half the probability of
    `kept`, and `plane | kept` has 1/2 more than that. The digits of a threshold, from the lowest,
    say which of the two makes a word of the probability `threshold / 2**len(planes)`. The highest
    digit reads the first plane, so that fewer bits read the first planes of more bits.
    """
    kept: Any = np.uint32(0)
    for plane, digit in zip(planes[::-1], digits[:-1], strict=True):
        if isinstance(digit, bool):
            kept = plane | kept if digit else plane & kept
        else:
            kept = (plane & (kept | digit)) | (kept & digit)
    # The digit beyond is 1 for the probability 1.
    if isinstance(digits[-1], bool):
        return jnp.full_like(kept, ALL_ONES) if digits[-1] else kept
    return kept | digits[-1]


def _read_words(words: Array, layout: _Layout, shape: Shape, differentiated: bool) -> Array:
    """Reads the bit of each element of the mask, in the way that moves the fewest bytes."""
    num_lead = len(layout.lead)

    def split_rows(words: Array, *, store: bool = False) -> Array:
        """Reads the words of a group along a new axis of its rows, which then joins the groups."""
        # A mask with a single group may have fewer rows than a word has bits.
        read_rows = GROUP
        if not export.is_symbolic_dim(layout.num_rows):
            read_rows = min(GROUP, layout.num_rows)
        row = lax.broadcasted_iota(np.uint32, [*[1] * (num_lead + 1), read_rows, 1], num_lead + 1)
        bits = ((words[..., None, :] >> row) & np.uint32(1)) == 1
        if layout.is_vector:
            return bits.reshape(-1)[: math.prod(shape)].reshape(shape)
        bits = bits.reshape(*layout.lead, layout.num_groups * read_rows, layout.columns)
        bits = lax.optimization_barrier(bits) if store else bits
        return bits[..., : layout.num_rows, :].reshape(shape)

    def select_group(words: Array) -> Array:
        """Looks the word of each row up among those of all groups, with a tree of selections."""
        row_axes = range(num_lead, num_lead + len(layout.rows))
        candidates = [
            lax.expand_dims(words[..., group, :], row_axes) for group in range(layout.num_groups)
        ]
        row = lax.iota(np.uint32, layout.num_rows).reshape(*[1] * num_lead, *layout.rows, 1)
        # Depends on the words in form. Otherwise a scan would compare it ahead, and keep arrays.
        row = row | (candidates[0] & np.uint32(0))
        # The lowest digit of the index of a row's group.
        digit = GROUP
        while len(candidates) > 1:
            is_odd = row & np.uint32(digit) != 0
            unpaired = candidates[len(candidates) // 2 * 2 :]
            pairs = zip(candidates[::2], candidates[1::2], strict=False)
            candidates = [jnp.where(is_odd, odd, even) for even, odd in pairs] + unpaired
            digit *= 2
        bits = (candidates[0] >> (row % np.uint32(GROUP))) & np.uint32(1)
        return (bits == 1).reshape(shape)

    # A TPU stores arrays in tiles. There splitting the rows copies the mask, unless groups are full
    # and the columns are the last axis in memory. Programs with gradients often choose another.
    groups_are_full = len(layout.rows) == 1 and layout.num_rows % GROUP == 0
    if layout.is_vector or export.is_symbolic_dim(layout.num_rows) or not words.size:
        return split_rows(words)
    if layout.num_groups <= MAX_SELECTED_GROUPS and (differentiated or not groups_are_full):
        return lax.platform_dependent(words, tpu=select_group, default=split_rows)
    if groups_are_full:
        return split_rows(words)
    return lax.platform_dependent(words, tpu=partial(split_rows, store=True), default=split_rows)


def _draw_on_each_device(mask: Array, layout: _Layout, mesh: AbstractMesh) -> Array:
    """Lets the compiler divide an axis only if each device can draw its share alone.

    Every device draws all of the other axes, so that it needs no words of others.
    """
    if layout.is_vector:
        whole_groups = mask.size % (GROUP * VECTOR_COLUMNS * mesh.size) == 0
        divisible = layout.axes if whole_groups else ()
    else:
        whole_groups = layout.num_rows % (GROUP * mesh.size) == 0
        divisible = (*layout.axes[: len(layout.lead) + whole_groups], layout.axes[-1])
    others = tuple(axis for axis in range(mask.ndim) if axis not in divisible)
    # Under `vmap`, JAX counts the axes of a constraint rightly only if the free ones come first.
    spec = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * len(divisible), *[None] * len(others))
    order = (*divisible, *others)
    mask = lax.with_sharding_constraint(mask.transpose(order), NamedSharding(mesh, spec))
    return mask.transpose([order.index(axis) for axis in range(mask.ndim)])


def _threefry2x32(
    first_key: Array, second_key: Array, first: Array, second: Array
) -> tuple[Array, Array]:
    """Hashes pairs of words as `jax.random` does, in operations that fuse with their neighbours.

    Reference:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", with 20 rounds.
    """
    keys = (first_key, second_key, first_key ^ second_key ^ np.uint32(0x1BD11BDA))
    first, second = first + keys[0], second + keys[1]
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            first = first + second
            second = (second << np.uint32(distance)) | (second >> np.uint32(32 - distance))
            second = first ^ second
        first = first + keys[(group + 1) % 3]
        second = second + keys[(group + 2) % 3] + np.uint32(group + 1)
    return first, second
