"""Random bits of a key, turned into keep decisions; the only place that draws bits for a mask.

An element is kept where its 16 random bits, read as an integer, are less than the *threshold*
`round((1 - rate) * 2**16)`. The probability that the bits realise is therefore exactly
`threshold / 2**16`, and it is this number, not `1 - rate`, that a mean-preserving scale must use.

The bits of an element depend on the key, the shape and the element's position alone, so a mask
is the same under `jit`, `vmap`, `scan`, `remat` and for every sharding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jdrop.annotations import Bool, UInt32

LEVELS = 2**16


def threshold(rate: float | Array) -> UInt32[Array | np.ndarray, "..."]:
    """How many of the `LEVELS` values of an element's bits keep it.

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
        key: one key; it is consumed.
        shape: the shape of the mask.
        thresholds: what `threshold` gave, of the rank of `shape` and broadcastable to it, or 0-d.
        out_sharding: the sharding of the mask where the mesh has explicit axes, else None.
    """
    bits = jax.random.bits(key, shape, jnp.uint16, out_sharding=out_sharding)
    return bits.astype(jnp.uint32) < thresholds
