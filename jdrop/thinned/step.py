"""The training step of a thinned network: take the kept units out, train, and put them back."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jdrop.network import DropoutSite, Network, Variables
from jdrop.thinned import blocks
from jdrop.thinned.optimizer import map_state
from jdrop.thinned.units import KeptBlocks, ThinningError, UnitAxes, UnitAxesTree, UnitGroup
from jdrop.train import Batch, TrainState, train_step


@dataclass(frozen=True, eq=False)
class ThinnedStep:
    """The `StepRule` of a thinned network; `jdrop.thinned.thin` makes it.

    Attributes:
        units: the layers whose units are deleted.
        axes: `UnitAxes` for every array of the variables.
        shuffles: whether the order of units changes at the beginning of each epoch.
        scales: whether the kept units are scaled in training.
        network: the network at full size.
        switched_off: the dropout layers that drop nothing in training.
    """

    units: tuple[UnitGroup, ...]
    axes: UnitAxesTree
    shuffles: bool
    scales: bool
    network: Network
    switched_off: frozenset[str]

    def start_epoch(self, key: Array, state: TrainState) -> TrainState:
        """Puts the units that are kept in blocks in a new order; no output changes.

        Args:
            key: consumed.
            state: the network at full size.
        """
        if not self.shuffles:
            return state
        trees = state.variables, state.opt_state
        variables, opt_state = self.shuffle(key, self.axes_in(state), trees)
        return replace(state, variables=variables, opt_state=opt_state)

    def step(self, key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        """Trains the kept units for one step; the deleted units stay as they were.

        Args:
            key: consumed.
            state: the network at full size.
            batch: inputs and labels.

        Returns:
            The network at full size after the step, and the mean loss of the batch before it, as
            `jdrop.train.train_step` returns it.

        Raises:
            ThinningError: an optimizer whose state cannot be taken apart; variables of other shapes
                than those that `thin` saw.
        """
        draw_key, mask_key = jax.random.split(key)
        kept = self.draw(draw_key)
        axes = self.axes_in(state)
        full = state.variables, state.opt_state
        variables, opt_state = self.take(axes, full, kept)
        thinned = replace(
            state, variables=variables, opt_state=opt_state, network=self.thinned_network(kept)
        )
        thinned, loss = train_step(mask_key, thinned, batch)
        trained = thinned.variables, thinned.opt_state
        variables, opt_state = self.put(axes, full, trained, kept)
        return replace(state, variables=variables, opt_state=opt_state, step=thinned.step), loss

    def draw(self, key: Array) -> KeptBlocks:
        """Draws the blocks to keep: every choice of `kept_blocks` blocks is equally probable."""
        kept = {}
        for index, group in enumerate(self.units):
            order = jax.random.permutation(jax.random.fold_in(key, index), group.num_blocks)
            kept[group.name] = jnp.sort(order[: group.kept_blocks])
        return kept

    def take(self, axes: UnitAxesTree, tree: Any, kept: KeptBlocks) -> Any:
        """The arrays of a tree without their deleted units.

        Args:
            axes: `UnitAxes` for each array of the tree.
            tree: arrays at full size.
            kept: the blocks that are kept.
        """

        def take_from(axes: UnitAxes, array: Array) -> Array:
            if axes.axes and array.shape != axes.shape:
                raise ThinningError(
                    f"an array has shape {array.shape} where `thin` found {axes.shape}; give "
                    "`thin` inputs of the shape of those in training."
                )
            return blocks.take(array, axes.axes, kept)

        return jax.tree.map(take_from, axes, tree)

    def put(self, axes: UnitAxesTree, tree: Any, kept_tree: Any, kept: KeptBlocks) -> Any:
        """The arrays of a tree with their kept units replaced by those of `kept_tree`.

        Args:
            axes: `UnitAxes` for each array of the tree.
            tree: arrays at full size.
            kept_tree: arrays of the shapes that `take` returns.
            kept: the blocks that are kept.
        """

        def put_into(axes: UnitAxes, array: Array, kept_array: Array) -> Array:
            return blocks.put(array, kept_array, axes.axes, kept)

        return jax.tree.map(put_into, axes, tree, kept_tree)

    def shuffle(self, key: Array, axes: UnitAxesTree, tree: Any) -> Any:
        """The arrays of a tree with the units of each layer in a new order.

        The network computes the same function, and other units become neighbours. Units that are
        kept one by one stay in order.

        Args:
            key: consumed.
            axes: `UnitAxes` for each array of the tree.
            tree: arrays at full size.
        """
        order = {
            group.name: jax.random.permutation(jax.random.fold_in(key, index), group.size)
            for index, group in enumerate(self.units)
            if group.block_size > 1
        }

        def reorder(axes: UnitAxes, array: Array) -> Array:
            one_by_one = [
                replace(axis, group=replace(axis.group, block_size=1))
                for axis in axes.axes
                if axis.group.name in order
            ]
            return blocks.take(array, one_by_one, order)

        return jax.tree.map(reorder, axes, tree)

    def axes_in(self, state: TrainState) -> tuple[UnitAxesTree, UnitAxesTree]:
        """`UnitAxes` for every array of the variables and of the optimizer's state.

        Raises:
            ThinningError: an optimizer whose state cannot be taken apart.
        """
        params = state.variables["params"]
        return self.axes, self.axes_in_opt_state(state.optimizer, state.opt_state, params)

    def axes_in_opt_state(
        self, optimizer: optax.GradientTransformation, opt_state: Any, params: Any
    ) -> UnitAxesTree:
        """`UnitAxes` for every array of an optimizer's state: those of the array's parameter.

        Raises:
            ThinningError: an optimizer whose state cannot be taken apart.
        """
        axes = self.axes["params"]
        return map_state(optimizer, lambda _, axes: axes, opt_state, params, axes, UnitAxes())

    def thinned_network(self, kept: KeptBlocks) -> Network:
        """The network of the kept units, for the variables that `take` returns."""
        groups = {group.name: group for group in self.units if group.has_dropout}

        def scale_kept(site: DropoutSite, inputs: Array) -> Array | None:
            if site.name not in groups:
                return inputs if site.name in self.switched_off else None
            group = groups[site.name]
            if group.is_input:
                inputs = inputs[..., kept[site.name]]
            return _scaled(inputs, group.scale) if self.scales else inputs

        def scale_of(axes: UnitAxes) -> float:
            groups_read = [axis.group for axis in axes.axes if axis.reads]
            scales = [group.scale for group in groups_read if self.scales and not group.has_dropout]
            return math.prod(scales, start=1.0)

        def scaled(axes: UnitAxes, array: Array) -> Array:
            scale = scale_of(axes)
            return array if scale == 1 else _scaled(array, scale)

        def restored(axes: UnitAxes, before: Array, after: Array) -> Array:
            return after if scale_of(axes) == 1 else before

        thinned = replace_unit_dropout(self.network, scale_kept)

        def train(variables: Variables, inputs: Any, key: Array) -> tuple[Any, Variables]:
            scaled_variables = jax.tree.map(scaled, self.axes, variables)
            outputs, after = thinned.apply_train(scaled_variables, inputs, key)
            return outputs, jax.tree.map(restored, self.axes, variables, after)

        return Network(thinned.apply_fn, train_fn=train)


def replace_unit_dropout(
    network: Network, f: Callable[[DropoutSite, Array], Array | None]
) -> Network:
    """The network with `f` in place of the dropout layers that drop units and are switched on.

    A network without `replace_fn` is a plain function; the function's own dropout is off.

    Args:
        network: the network at full size.
        f: `f(site, inputs)` -> the outputs of the layer, or None to leave the layer as it is.
    """

    def at_active_site(site: DropoutSite, inputs: Array) -> Array | None:
        return f(site, inputs) if site.drops_units and not site.deterministic else None

    if network.replace_fn is not None:
        return network.replace_dropout(at_active_site, attention_dropout=True)
    return Network(lambda variables, inputs, key: network.apply_fn(variables, inputs, None))


def _scaled(x: Array, scale: float) -> Array:
    """`x * scale`, rounded once."""
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * scale).astype(x.dtype)
