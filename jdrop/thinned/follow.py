"""Follows the units of a layer through a network, to every array that belongs to them.

Units run along one axis of an activation. From there `follow_units` goes through the operations in
both directions, by the rules of `jdrop.thinned.rules`. It ends at the variables: the columns of the
weights that make the units, their biases and statistics, and the rows of the weights that read
them. An operation that mixes units in another way than such a product, as layer normalisation does,
cannot be computed with some of them only. A residual connection adds units to what is not theirs.
In both cases the network cannot be thinned, and a `ThinningError` says so.

Example: a dense layer, a rectifier, dropout, a dense layer, for 4 examples.

    def train(w, v, x):                  # w: [3, 8], v: [8, 2], x: [4, 3]
        hidden = jax.nn.relu(x @ w)
        return tag_dropout("drop", hidden) @ v

The jaxpr, with the calls inlined, and the axes along which the 8 units lie:

    operation                        units
    d = dot_general x w              axis 1 of d, axis 1 of w (its columns make the units)
    e = max d 0.0                    axis 1 of e, axis 1 of d
    f = name[jdrop dropout drop] e   axis 1 of f and axis 1 of e, where `follow_units` starts
    g = dot_general f v              axis 0 of v (its rows read the units); none of g

In the last line, `dot_general` multiplies axis 1 of `f` with axis 0 of `v` and sums over the units.
This link crosses to the weights that read the units; `reads` is True there. The two checks:

- Zeros: `f` is 0 where a unit is dropped, and `v` reads `f`. So a deleted unit contributes nothing.
  If `v` read `e + 1` instead, `check_zeros` would raise.
- Scales: without the dropout layer, `v` would be scaled in place of `f`. `v` is a variable that is
  read as it is. If the network read `exp(v)` instead, `check_scales` would raise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jdrop.thinned.jaxpr import Operation, Program
from jdrop.thinned.rules import HINTS, RULES, Zeros
from jdrop.thinned.units import ThinningError, UnitAxis


@dataclass(frozen=True)
class Link:
    """A link between two arrays, through an operation or the training update.

    Attributes:
        operation: the operation; None for the training update of a variable.
        here: the units in one array.
        there: the same units in the other array.
    """

    operation: Operation | None
    here: UnitAxis
    there: UnitAxis

    @property
    def crosses(self) -> bool:
        """From one factor of a product to the other, which is summed over the units."""
        return self.here.reads != self.there.reads


def follow_units(program: Program, starts: Sequence[UnitAxis]) -> list[Link]:
    """Every link between arrays that the units lie in.

    Args:
        program: the operations of the network.
        starts: axes along which the units lie.

    Raises:
        ThinningError: an operation, or an array, that does not allow some of the units only.
    """
    links: list[Link] = []
    seen, pending = set(starts), list(starts)
    while pending:
        here = pending.pop()
        _check_array(program, here)
        new_links = [*_links_of_operations(program, here), *_links_of_update(program, here)]
        new_axes = {link.there for link in new_links} - seen
        links += new_links
        seen |= new_axes
        pending += new_axes
    return links


def _check_array(program: Program, here: UnitAxis) -> None:
    name = here.group.name
    if here.array in program.outputs:
        raise ThinningError(f"{name}: its units are among the outputs of the network.")
    if here.array in program.inputs:
        raise ThinningError(f"{name}: its units are among the inputs of the network.")
    if here.array in program.constants:
        raise ThinningError(f"{name}: its units are combined with an array that is no variable.")


def _links_of_operations(program: Program, here: UnitAxis) -> list[Link]:
    name = here.group.name
    links: list[Link] = []
    for use in program.uses.get(here.array, ()):
        layer = use.operation.dropout_layer
        if layer == name:
            continue
        if layer is not None:
            raise ThinningError(
                f"{name}: its units are those of the dropout layer {layer!r} too; name {layer!r} "
                "in `rates` in its place, or give it the rate 0 there."
            )
        primitive = use.operation.primitive
        axes = None
        if primitive in RULES:
            axes = RULES[primitive].follow(program.shapes, use, here)
        if axes is None:
            raise ThinningError(
                f"{name}: its units go through `{primitive}`, which cannot be computed with some "
                "of them only; units can be deleted between products with weights, if every "
                f"operation between the products treats each unit alone.{HINTS.get(primitive, '')}"
            )
        links += [Link(use.operation, here, there) for there in axes]
    return links


def _links_of_update(program: Program, here: UnitAxis) -> list[Link]:
    """Links between a variable and its value after the training pass."""
    return [
        Link(None, here, replace(here, array=array))
        for pair in zip(program.leaves, program.leaves_after, strict=True)
        for source, array in (pair, pair[::-1])
        if here.array == source
    ]


def check_zeros(program: Program, dropped: UnitAxis, links: Sequence[Link]) -> None:
    """Raises if a dropped unit still contributes to the next layer.

    Follows arrays that are zero whenever the dropout output is.

    Args:
        program: the operations of the network.
        dropped: the units in the output of the dropout layer.
        links: all links between arrays that the units lie in.

    Raises:
        ThinningError: a product with weights that reads units which may not be 0.
    """
    links_of: dict[Operation | None, list[Link]] = {}
    for link in links:
        links_of.setdefault(link.operation, []).append(link)
    zero_axes = {dropped}
    for operation in program.operations:
        sources: dict[UnitAxis, set[int]] = {}
        for link in links_of.get(operation, ()):
            if link.here in zero_axes and link.there.array in operation.outputs:
                sources.setdefault(link.there, set()).add(link.here.array)
        gives_zero = RULES[operation.primitive].gives_zero if sources else None
        for there, arrays in sources.items():
            if gives_zero is not None and gives_zero(operation, Zeros(arrays, program.literals)):
                zero_axes.add(there)
    for link in links:
        factors = (replace(axis, reads=False) for axis in (link.here, link.there))
        if link.crosses and zero_axes.isdisjoint(factors):
            raise ThinningError(
                f"{dropped.group.name}: a unit that it drops still contributes to the next layer: "
                "the unit is read beside the dropout layer too, or what follows the dropout layer "
                "is not, or not known to be, 0 for a 0. Deleting the unit would not be dropping "
                "it. Put the dropout layer last, right before the weights."
            )


def check_scales(links: Sequence[Link]) -> None:
    """Raises where scaling the weights is not equivalent to scaling the units they read.

    Args:
        links: all links between arrays that the units lie in.

    Raises:
        ThinningError: weights that are computed from, or changed in training.
    """
    reading = {link.here.array for link in links if link.here.reads}
    for link in links:
        if link.crosses or not link.here.reads:
            continue
        if link.operation is None:
            keeps_scale = link.here.array == link.there.array
        else:
            num_reading = sum(array in reading for array in link.operation.inputs)
            keeps_scale = RULES[link.operation.primitive].keeps_scale and num_reading == 1
        if not keeps_scale:
            raise ThinningError(
                f"{link.here.group.name}: the weights that read its units are computed from, or "
                "changed in training, and cannot be scaled in their place. Put a dropout layer "
                "behind the units, or choose scale=False."
            )
