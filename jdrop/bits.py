"""Random bits of a key, turned into keep decisions; the only module that draws bits for a mask.

An element is kept if its random bits, read as an integer, lie below a threshold. With 16 bits the
threshold is `round((1 - rate) * 2**16)`. Fewer bits serve where they give the same probability,
such as 1 bit for a rate of 1/2. So the bits realise the probability `threshold / 2**16` exactly,
and a mean-preserving scale must divide by it, not by `1 - rate`.

`jax.random.bits` hashes a pair of words, 64 bits, for each element, and on CPU its hash is a loop
that does not fuse. Here the same hash, threefry2x32 with 20 rounds, is written in array operations,
and a pair of words serves `planes = min(64 / num_bits, 32)` elements. A *plane* is `RUN`
neighbouring elements, which read the same bits of `RUN` neighbouring pairs. The planes that share
their pairs form a *block*. `_draw_decisions` shows the layout.

With over 2 bits only the keep decisions are stored, one bit each. With 1 or 2 bits, or per-element
thresholds, the random words are stored. With 1 bit the second word of a pair is not used.

A row is the elements of some trailing axes. Each row starts a block, and the last block of a row
may be partly unused. The bits of an element depend only on the key, the shape, the number of bits
and the element's index. So a mask is the same under `jit`, `vmap`, `scan`, `remat` and every
sharding. The exception is `vmap` over keys of JAX's generators `rbg` and `unsafe_rbg`, whose own
bits depend on the other keys. Devices exchange no bits: a device whose shard is not made of whole
rows or whole blocks draws the whole array.

Mask bits pass the batteries Rabbit and Alphabit of TestU01 on 2**30 bits each (57 statistics). They
pass 27 tests of dieharder too (61 statistics). All tests read masks of 1 and of 16 random bits per
element, which are drawn as in training: a key per run, `fold_in` per step, split into layers of the
shapes 128 x 1024, 50 x 256 and 8 x 197 x 768. None of the 236 p-values lies within 1e-3 of 0 or 1.
The extremes are 0.0033 and 0.9959; a control, bytes of the operating system, gives 0.0023 and
0.9980. `scripts/randomness.py` repeats these runs. `tests/test_randomness.py` tests planes,
columns, blocks, related keys, and the members, steps and layers of a training run.
`scripts/results/engine.md` lists the other layouts that were timed.
"""

import math
from functools import partial, reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jdrop.annotations import Bool, Shape, UInt32

LEVELS = 2**16

# Pairs that a plane reads. With 128, a mask of 50 x 256 took two to three times as long.
RUN = 256

# The largest unused share of a row's blocks. Shorter rows let a device draw only its own rows.
MAX_UNUSED = 1 / 8


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
) -> Bool[Array, "..."]:
    """Draws a mask whose elements are True, that is kept, with probability `threshold / LEVELS`.

    Args:
        key: a single typed key; it is consumed.
        shape: the shape of the mask.
        thresholds: the result of `threshold`: a scalar, or an array of the rank of `shape` that
            broadcasts to `shape`.
        sharding: the mesh, and how its explicit axes divide the mask; None without a mesh. The
            compiler chooses the division along all other mesh axes.
    """
    num_bits = 16
    if not isinstance(thresholds, jax.Array):
        num_bits = next(n for n in (1, 2, 4, 8, 16) if thresholds % (LEVELS >> n) == 0)
    draw = partial(_draw_decisions, shape=shape, num_bits=num_bits)
    thresholds = thresholds >> (16 - num_bits)
    if sharding is None:
        return draw(key, thresholds, mesh=None)
    mesh = sharding.mesh.abstract_mesh
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, axis_type in axes if axis_type == AxisType.Explicit)
    draw = partial(draw, mesh=mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto)))
    if explicit:
        draw = jax.sharding.auto_axes(draw, axes=explicit, out_sharding=sharding)
    return draw(key, thresholds)


@partial(jax.jit, static_argnames=("shape", "num_bits", "mesh"), inline=True)
def _draw_decisions(
    key: Array, thresholds: Any, shape: Shape, num_bits: int, mesh: AbstractMesh | None
) -> Bool[Array, "..."]:
    # The layout for RUN = 256 and 16 bits, where a pair of words serves 4 planes:
    #   elements of the block   0 ... 255    256 ... 511   512 ... 767   768 ... 1023
    #   their plane             0            1             2             3
    #   pair of each element    0 ... 255    0 ... 255     0 ... 255     0 ... 255
    #   bits of that pair       0 ... 15     16 ... 31     32 ... 47     48 ... 63
    # Element 600 lies in plane 2, reads pair 600 - 2 * 256 = 88, and there the 16 low bits of the
    # second word. Element 1024 starts the next block, which has pairs of its own.
    planes = min(64 // num_bits, 32)
    block = planes * RUN
    row_axis = _row_axis(shape, block)
    rows, row_size = shape[:row_axis], math.prod(shape[row_axis:])
    blocks = -(-row_size // block)
    pairs = _pairs(key, (*rows, blocks))

    decide_at_once = num_bits > 2 and np.ndim(thresholds) == 0
    if decide_at_once:
        halves = [_pack_decisions(pair, num_bits, thresholds) for pair in pairs]
    else:
        halves = [jnp.stack(pair[: -(-planes * num_bits // 32)], -2) for pair in pairs]
    # The compiler never fuses a concatenation with its readers. So it computes the hash once, not
    # again for each plane.
    words = jnp.concatenate(halves, -1)[..., None, :]

    stored_bits = 1 if decide_at_once else num_bits
    plane_axis = words.ndim - 2
    shifts_shape = [1] * words.ndim
    shifts_shape[plane_axis] = planes // words.shape[-3]
    shifts = stored_bits * lax.broadcasted_iota(words.dtype, shifts_shape, plane_axis)
    values = (words >> shifts) & words.dtype.type(2**stored_bits - 1)
    values = values.reshape(*rows, blocks * block)[..., :row_size].reshape(shape)

    if mesh is not None and AxisType.Auto in mesh.axis_types:
        # Only axes of whole rows or blocks are divided: a device never sends words to another.
        num_divisible = row_axis + (row_size % (block * mesh.size) == 0)
        spec = [
            PartitionSpec.UNCONSTRAINED if axis < num_divisible else None
            for axis in range(len(shape))
        ]
        values = lax.with_sharding_constraint(values, NamedSharding(mesh, PartitionSpec(*spec)))
    return values != 0 if decide_at_once else values < thresholds


def _row_axis(shape: Shape, block: int) -> int:
    """The first axis of the shortest rows whose blocks are unused by at most `MAX_UNUSED`.

    No block holds elements of two rows, so a device can draw its own rows alone.

    Raises:
        ValueError: an axis of symbolic size after the first, unless shorter rows are found.
    """
    # Rows from the first axis on are right whatever its size is, so it may be symbolic.
    for axis in reversed(range(1, len(shape))):
        size = math.prod(shape[axis:])
        if export.is_symbolic_dim(size):
            raise ValueError(
                f"a mask of the shape {shape} cannot be drawn: its bits depend on the sizes of all "
                "axes but the first, and one of them is symbolic; export with numbers for these "
                "sizes, or without dropout."
            )
        if -size % block <= MAX_UNUSED * size:
            return axis
    return 0


def _pack_decisions(pair: tuple[Array, Array], num_bits: int, threshold: Any) -> Array:
    """Packs a pair's decisions into an integer, lowest plane first: `[..., 1, RUN / 2]`."""
    bits_of_an_element = np.uint32(2**num_bits - 1)
    decisions = [
        ((word >> np.uint32(shift)) & bits_of_an_element) < threshold
        for word in pair
        for shift in range(0, 32, num_bits)
    ]
    bits = [
        decision.astype(np.uint32) << np.uint32(plane) for plane, decision in enumerate(decisions)
    ]
    return reduce(or_, bits).astype(f"uint{max(8, len(decisions))}")[..., None, :]


def _pairs(key: Array, blocks: Shape) -> list[tuple[Array, Array]]:
    """Hashes `RUN` pairs of words for each block, as two halves of shape `[*blocks, RUN / 2]`."""
    half = RUN // 2
    if jax.random.key_impl(key) != "threefry2x32":
        first, second = jax.random.bits(key, (2, *blocks, RUN), jnp.uint32)
        return [(first[..., :half], second[..., :half]), (first[..., half:], second[..., half:])]
    if jax.config.jax_debug_key_reuse:  # type: ignore[attr-defined]
        # Marks the key as consumed, which reading its data does not.
        jax.random.bits(key, ())
    first_key, second_key = jax.random.key_data(key)
    block = lax.iota(np.uint32, math.prod(blocks)).reshape(*blocks, 1)
    pair = lax.broadcasted_iota(np.uint32, (*[1] * len(blocks), half), len(blocks))
    return [
        _threefry2x32(first_key, second_key, block, pair + np.uint32(start)) for start in (0, half)
    ]


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
