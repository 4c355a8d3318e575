"""A call of a dropout layer, as functions see it that list or replace such calls."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jax import Array
from jax.typing import ArrayLike

from jdrop.annotations import Shape


@dataclass(frozen=True)
class DropoutSite:
    """One call of a dropout layer in a pass of a network.

    Attributes:
        name: the path of the layer, for instance "block/Dropout_0".
        index: 0 for the layer's first call in the pass, 1 for its second, and so on.
        shape: the shape of the layer's inputs.
        rate: the probability to drop, from the constructor or from the call.
        broadcast_dims: the axes along which elements share one decision.
        deterministic: whether the layer is switched off in this pass.
        make_key: returns the key from which the layer would draw its mask. Call it at most once,
            and only during the pass.
        fixed_count: whether the layer keeps a fixed number of samples, as `jdrop.drop_branch` does.
            The layer's inputs are then the outputs of the branch.
        layer_class: the class of the layer; None: unknown.
    """

    name: str
    index: int
    shape: Shape
    rate: ArrayLike
    broadcast_dims: tuple[int, ...]
    deterministic: bool
    make_key: Callable[[], Array] = field(repr=False, compare=False)
    fixed_count: bool = False
    layer_class: type | None = field(default=None, repr=False, compare=False)

    @property
    def drops_units(self) -> bool:
        """Whether the layer decides for each unit, the last axis, separately."""
        return {-1, len(self.shape) - 1}.isdisjoint(self.broadcast_dims)


ReplaceFn = Callable[[DropoutSite, Array], Array | None]
"""`f(site, inputs)` -> the outputs of the layer; None: the layer does what it always does."""

AttentionDropout = bool | Callable[[DropoutSite], Array | None]
"""Whether attention layers drop weights; or `g(site)` -> the key to drop with; None: drop none."""
