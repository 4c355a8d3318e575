"""The vocabulary of thinning: the units of a layer, and the axes of arrays along which they lie."""

from dataclasses import dataclass
from typing import Any

from jax import Array

KeptBlocks = dict[str, Array]
"""For each layer by name: the indices of the blocks of units to take, in their order."""

MAX_DEVIATION = 1 / 64
"""The most by which blocks may change the fraction of units that are kept."""


class ThinningError(ValueError):
    """A network that cannot be thinned; the message says why, and what can be done instead."""


@dataclass(frozen=True)
class UnitGroup:
    """The units of one layer, which are kept or deleted in blocks.

    Attributes:
        name: the name of the dropout layer, or of the layer whose weights make the units.
        size: the number of units.
        rate: the probability to drop, as requested.
        block_size: how many neighbouring units are kept or deleted together.
        is_input: whether the units are the inputs of the network.
        has_dropout: whether a dropout layer drops the units.
    """

    name: str
    size: int
    rate: float
    block_size: int
    is_input: bool
    has_dropout: bool

    @property
    def num_blocks(self) -> int:
        """How many blocks the units form."""
        return self.size // self.block_size

    @property
    def kept_blocks(self) -> int:
        """How many blocks are kept in every draw."""
        return max(1, round((1 - self.rate) * self.num_blocks))

    @property
    def scale(self) -> float:
        """The factor that makes up for the deleted units: one over the fraction kept."""
        return self.num_blocks / self.kept_blocks


@dataclass(frozen=True)
class UnitAxis:
    """An axis of an array along which the units of a layer lie.

    Index `i` of the axis belongs to unit `i // inner % group.size`: each unit has `inner`
    neighbouring indices, and the pattern may repeat, as after the flattening of a convolution.

    Attributes:
        array: the array, by its index in the `Program`.
        axis: the axis.
        inner: how many neighbouring indices belong to one unit.
        reads: whether the array holds weights that read the units.
        group: the units.
    """

    array: int
    axis: int
    inner: int
    reads: bool
    group: UnitGroup

    @property
    def num_blocks(self) -> int:
        """The axis repeats a pattern of `num_blocks` blocks, each `width` indices wide."""
        return self.group.num_blocks

    @property
    def width(self) -> int:
        """The indices of one block."""
        return self.group.block_size * self.inner


@dataclass(frozen=True)
class UnitAxes:
    """Every axis of one array along which units lie; a leaf of a tree like the variables.

    Attributes:
        axes: in the order of the array's axes.
        shape: of the array at full size.
    """

    axes: tuple[UnitAxis, ...] = ()
    shape: tuple[int, ...] = ()


UnitAxesTree = Any
"""A tree like the variables or the optimizer's state, with `UnitAxes` as leaves."""


def largest_block_size(size: int, rate: float, max_block_size: int) -> int:
    """The largest divisor of `size` with which blocks keep the fraction that units would.

    Args:
        size: the number of units.
        rate: the probability to drop.
        max_block_size: the largest block size allowed.

    Returns:
        A block size of at most `max_block_size` that keeps a fraction within 1/64 of that of
        single units, and that deletes at least one block; 1 if there is none.
    """
    fraction = max(1, round((1 - rate) * size)) / size
    for block_size in range(min(max_block_size, size), 1, -1):
        if size % block_size == 0:
            num_blocks = size // block_size
            kept_blocks = max(1, round((1 - rate) * num_blocks))
            # The inverse of the scale: rounding decides where the deviation is exactly 1/64.
            deviation = abs(1 / (num_blocks / kept_blocks) - fraction)
            if deviation <= MAX_DEVIATION and kept_blocks < num_blocks:
                return block_size
    return 1
