"""Random bits of a key, turned into keep decisions; the only place that draws bits for a mask.

An element is kept where its random bits, read as an integer, are less than a threshold. With 16
bits the threshold is `round((1 - rate) * 2**16)`; fewer bits serve where they give the same
probability (1 bit for a rate of 1/2). What the bits realise is therefore exactly
`threshold / 2**16`, and it is this number, not `1 - rate`, that a mean-preserving scale must use.

Why not `jax.random.bits`: for each element JAX hashes one block of 64 bits, of which dropout needs
1 to 16, and on CPU the hash is a loop that cannot be fused with what uses the bits. Here the same
hash, threefry2x32 with its 20 rounds, is written out in array operations, and all 64 bits of a
block are used. How they are laid out is a matter of speed:

    element                    0 ... 255      256 ... 511      512 ...
    word of its block          0 ... 255        0 ... 255        0 ...
    bits of that word        lowest num_bits   next num_bits   and so on

A *plane* of `RUN` neighbouring elements reads the same bits of `RUN` neighbouring words, so that
the words are read in order and shifted by one number; 32 / num_bits planes make a *block*.

The bits of an element depend on the key, the number of bits and the element's number in row-major
order alone, so a mask is the same under `jit`, `vmap`, `scan`, `remat` and for every sharding.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding

from jdrop.annotations import Bool, UInt32

LEVELS = 2**16

# Words that one plane reads. With 128, a mask of 50 x 256 took two to three times as long.
RUN = 256


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
    out_sharding: NamedSharding | None,
) -> Bool[Array, "..."]:
    """Decides for each element whether it is kept: True with probability `threshold / LEVELS`.

    Args:
        key: one typed key; it is consumed.
        shape: the shape of the mask.
        thresholds: what `threshold` gave, of the rank of `shape` and broadcastable to it, or 0-d.
        out_sharding: the sharding of the mask where the mesh has explicit axes, else None.
    """
    num_bits = 16
    if not isinstance(thresholds, jax.Array):
        num_bits = next(n for n in (1, 2, 4, 8, 16) if thresholds % (LEVELS >> n) == 0)
    draw = partial(_draw, shape=shape, num_bits=num_bits)
    if out_sharding is not None:
        # Every device makes its own part, as the compiler divides it.
        mesh = out_sharding.mesh
        explicit = tuple(
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Explicit
        )
        draw = jax.sharding.auto_axes(draw, axes=explicit, out_sharding=out_sharding)
    return draw(key, thresholds >> (16 - num_bits))


@partial(jax.jit, static_argnames=("shape", "num_bits"), inline=True)
def _draw(key: Array, thresholds: Any, shape: tuple[int, ...], num_bits: int) -> Array:
    planes = 32 // num_bits
    size = math.prod(shape)
    num_blocks = -(-size // (planes * RUN))
    blocks: tuple[int, ...] = (num_blocks,)
    if shape and shape[-1] % (planes * RUN) == 0:
        # The same blocks, numbered along the axes of the mask: what splits those splits these.
        blocks = (*shape[:-1], shape[-1] // (planes * RUN))
    words = _words(key, blocks)[..., None, :]
    rank = len(blocks)
    shifts = num_bits * lax.broadcasted_iota(np.uint32, (*[1] * rank, planes, 1), rank)
    values = (words >> shifts) & np.uint32(2**num_bits - 1)
    if num_blocks * planes * RUN != size:
        values = values.reshape(-1)[:size]
    return values.reshape(shape) < thresholds


def _words(key: Array, blocks: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Random words of 32 bits, `[*blocks, RUN]`: of threefry, or of the key's own generator."""
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.bits(key, (*blocks, RUN), jnp.uint32)
    if jax.config.jax_debug_key_reuse:  # type: ignore[attr-defined]
        # Tells the checker that the key is used up, which reading its data does not.
        jax.random.bits(key, ())
    first, second = jax.random.key_data(key)
    block = lax.iota(np.uint32, math.prod(blocks)).reshape(*blocks, 1)
    pair = lax.broadcasted_iota(np.uint32, (*[1] * len(blocks), RUN // 2), len(blocks))
    return jnp.concatenate(_threefry2x32(first, second, block, pair), -1)


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
