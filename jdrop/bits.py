"""Random bits of a key, turned into keep decisions; the only place that draws bits for a mask.

An element is kept where its random bits, read as an integer, are less than a threshold. With 16
bits the threshold is `round((1 - rate) * 2**16)`; fewer bits serve where they give the same
probability (1 bit for a rate of 1/2). What the bits realise is therefore exactly
`threshold / 2**16`, and it is this number, not `1 - rate`, that a mean-preserving scale must use.

Why not `jax.random.bits`: for each element JAX hashes one pair of words, 64 bits, of which dropout
needs 1 to 16, and on CPU the hash is a loop that cannot be fused with what uses the bits. Here the
same hash, threefry2x32 with its 20 rounds, is written out in array operations, and a pair of words
decides for `planes = min(64 / num_bits, 32)` elements. How they lie is a matter of speed:

    element                    0 ... 255      256 ... 511      512 ...
    pair of its block          0 ... 255        0 ... 255        0 ...
    bits of that pair        lowest num_bits   next num_bits   and so on

A *plane* is `RUN` neighbouring elements that read the same bits of `RUN` neighbouring pairs, so
that the pairs are read in order and shifted by one number; the planes of a pair make a *block*.
Decisions of more than 2 bits are made where the hash is computed, and only they are stored, one
bit for each element; of 1 or 2 bits, or where each element has a threshold of its own, the words
themselves are. With 1 bit the second word of a pair is not used.

The array is cut into rows, which are its trailing axes taken together, and each row into blocks,
the last of them in part unused. The bits of an element depend on the key, the shape, the number of
bits and the element's place alone, so a mask is the same under `jit`, `vmap`, `scan`, `remat` and
for every sharding. (But for `vmap` over keys of JAX's generators `rbg` and `unsafe_rbg`, whose own
bits depend on the other keys.) No device sends bits to another: where the part of a device is
neither a number of rows nor one of whole blocks, each draws the bits of the whole array.

Mask bits, drawn as the layers of a run draw them (key of the run, `fold_in` of the step, split
into sites; shapes 128 x 1024, 50 x 256 and 8 x 197 x 768), pass the batteries Rabbit and Alphabit
of TestU01 on 2**30 bits each (57 statistics) and 27 tests of dieharder (61 statistics), with 1
random bit an element and with 16. None of the 236 p-values lies within 1e-3 of 0 or 1; the
extremes are 0.0033 and 0.9959, and for bytes of the operating system, as a control, 0.0023 and
0.9980. `scripts/randomness.py` repeats this; `tests/test_randomness.py` looks where the layout
would show a fault: planes, columns, blocks, related keys, and the members, steps and sites of a
training run. `scripts/results/engine.md` tells what else was tried for speed.
"""

import math
from functools import partial, reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jdrop.annotations import Bool, UInt32

LEVELS = 2**16

# Pairs that one plane reads. With 128, a mask of 50 x 256 took two to three times as long.
RUN = 256

# How much of the blocks of a row may be unused, so that a device draws for its own rows alone.
MAX_UNUSED = 1 / 8


def threshold(rate: float | Array) -> UInt32[Array | np.ndarray, "..."]:
    """How many of `LEVELS` equally probable values of an element's bits keep it.

    `round((1 - rate) * LEVELS)`, and at least 1 for every rate below 1, so that a mean-preserving
    scale exists. A rate that is NaN or outside [0, 1] gives `LEVELS`: everything is kept.

    Args:
        rate: the probability to drop, any shape, float.

    Returns:
        Thresholds from 0 to `LEVELS`, of the shape of `rate`.
    """
    # A Python number is worked out now, in the same float32 arithmetic as a traced one.
    xp: Any = np if isinstance(rate, float) else jnp
    kept_levels = xp.round((1 - xp.asarray(rate, np.float32)) * LEVELS)
    # Compared before that rounding, which may carry a float64 rate to 1 or across it.
    kept_levels = xp.where(rate < 1, xp.maximum(kept_levels, 1), 0)
    in_range = (rate >= 0) & (rate <= 1)
    return xp.where(in_range, kept_levels, LEVELS).astype(np.uint32)


def draw_mask(
    key: Array,
    shape: tuple[int, ...],
    thresholds: UInt32[Array | np.ndarray, "..."],
    sharding: NamedSharding | None,
) -> Bool[Array, "..."]:
    """Decides for each element whether it is kept: True with probability `threshold / LEVELS`.

    Args:
        key: one typed key; it is consumed.
        shape: the shape of the mask.
        thresholds: what `threshold` gave, of the rank of `shape` and broadcastable to it, or 0-d.
        sharding: the mesh, and along its explicit axes how the mask is to be divided; None where
            there is no mesh. Along its other axes the compiler divides the mask.
    """
    num_bits = 16
    if not isinstance(thresholds, jax.Array):
        num_bits = next(n for n in (1, 2, 4, 8, 16) if thresholds % (LEVELS >> n) == 0)
    draw = partial(_draw, shape=shape, num_bits=num_bits)
    thresholds = thresholds >> (16 - num_bits)
    if sharding is None:
        return draw(key, thresholds, mesh=None)
    mesh = sharding.mesh.abstract_mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    draw = partial(draw, mesh=mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto)))
    if explicit:
        draw = jax.sharding.auto_axes(draw, axes=explicit, out_sharding=sharding)
    return draw(key, thresholds)


@partial(jax.jit, static_argnames=("shape", "num_bits", "mesh"), inline=True)
def _draw(
    key: Array, thresholds: Any, shape: tuple[int, ...], num_bits: int, mesh: AbstractMesh | None
) -> Bool[Array, "..."]:
    planes = min(64 // num_bits, 32)
    block = planes * RUN
    row_axis = _row_axis(shape, block)
    rows, row_size = shape[:row_axis], math.prod(shape[row_axis:])
    blocks = -(-row_size // block)
    pairs = _pairs(key, (*rows, blocks))

    decide_at_once = num_bits > 2 and np.ndim(thresholds) == 0
    if decide_at_once:
        halves = [_decide(pair, num_bits, thresholds) for pair in pairs]
    else:
        halves = [jnp.stack(pair[: -(-planes * num_bits // 32)], -2) for pair in pairs]
    # The compiler fuses a concatenation with nothing that reads it, so that the hash is computed
    # once for all planes, not again for each.
    words = jnp.concatenate(halves, -1)[..., None, :]

    field = 1 if decide_at_once else num_bits
    axis = words.ndim - 2
    fields = [1] * words.ndim
    fields[axis] = planes // words.shape[-3]
    shifts = field * lax.broadcasted_iota(words.dtype, fields, axis)
    values = (words >> shifts) & words.dtype.type(2**field - 1)
    values = values.reshape(*rows, blocks * block)[..., :row_size].reshape(shape)

    if mesh is not None and AxisType.Auto in mesh.axis_types:
        # What a device has in part of a block it draws whole: words never travel.
        whole = row_axis + (row_size % (block * mesh.size) == 0)
        spec = [PartitionSpec.UNCONSTRAINED if axis < whole else None for axis in range(len(shape))]
        values = lax.with_sharding_constraint(values, NamedSharding(mesh, PartitionSpec(*spec)))
    return values != 0 if decide_at_once else values < thresholds


def _row_axis(shape: tuple[int, ...], block: int) -> int:
    """The first axis of a row: the shortest rows that leave at most `MAX_UNUSED` of their blocks.

    No block holds elements of two rows, so that a device draws for its own rows alone.
    """
    for axis in reversed(range(len(shape))):
        size = math.prod(shape[axis:])
        if -size % block <= MAX_UNUSED * size:
            return axis
    return 0


def _decide(pair: tuple[Array, Array], num_bits: int, threshold: Any) -> Array:
    """The decisions of a pair of words, the first in the lowest bit: `[..., 1, RUN / 2]`."""
    last = np.uint32(2**num_bits - 1)
    kept = [
        ((word >> np.uint32(shift)) & last) < threshold
        for word in pair
        for shift in range(0, 32, num_bits)
    ]
    bits = [one.astype(np.uint32) << np.uint32(place) for place, one in enumerate(kept)]
    return reduce(or_, bits).astype(f"uint{max(8, len(kept))}")[..., None, :]


def _pairs(key: Array, blocks: tuple[int, ...]) -> list[tuple[Array, Array]]:
    """Pairs of words, `RUN` for each block, in two halves of shape `[*blocks, RUN / 2]`."""
    half = RUN // 2
    if jax.random.key_impl(key) != "threefry2x32":
        first, second = jax.random.bits(key, (2, *blocks, RUN), jnp.uint32)
        return [(first[..., :half], second[..., :half]), (first[..., half:], second[..., half:])]
    if jax.config.jax_debug_key_reuse:  # type: ignore[attr-defined]
        # Tells the checker that the key is used up, which reading its data does not.
        jax.random.bits(key, ())
    first_key, second_key = jax.random.key_data(key)
    block = lax.iota(np.uint32, math.prod(blocks)).reshape(*blocks, 1)
    place = lax.broadcasted_iota(np.uint32, (*[1] * len(blocks), half), len(blocks))
    return [
        _threefry2x32(first_key, second_key, block, place + np.uint32(start)) for start in (0, half)
    ]


def _threefry2x32(
    first_key: Array, second_key: Array, first: Array, second: Array
) -> tuple[Array, Array]:
    """Hashes pairs of words, as `jax.random` does, in operations that fuse with their neighbours.

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
