"""Makes a network thinned in training: chooses layers, follows their units, checks the result."""

import contextlib
import itertools
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jdrop import functional
from jdrop.network import DropoutSite, Network, Variables
from jdrop.thinned.follow import check_scales, check_zeros, follow_units
from jdrop.thinned.jaxpr import Program, read_program, tag_dropout
from jdrop.thinned.step import ThinnedStep, replace_unit_dropout
from jdrop.thinned.units import (
    ThinningError,
    UnitAxes,
    UnitAxesTree,
    UnitAxis,
    UnitGroup,
    largest_block_size,
)


def thin(
    network: Any,
    inputs: Any,
    rates: Mapping[str, ArrayLike] | None = None,
    *,
    block_size: int = 16,
    shuffle: bool = True,
    scale: bool = True,
) -> Network:
    r"""A network whose training steps train thinned networks at their real size.

    Each step deletes some units of each layer, trains the smaller network, and puts the deleted
    units back as they were, with their weights, statistics and optimizer moments. Of `n` blocks of
    units exactly `round((1 - rate) n)` are kept, and at least one. The outputs of the kept units
    are divided by the fraction kept.

    Only jdrop's training functions apply the thinning: `jdrop.train.train_step` and `fit`,
    `jdrop.ensemble.fit_ensemble`, `jdrop.compare`. Called directly, the network behaves like the
    original. Optimizers that combine many entries, by their norm or as a matrix (LAMB, Muon,
    clipping by the global norm), see those of the thinned network.

    Args:
        network: a network made by `jdrop.linen.as_network` or `jdrop.nnx.as_network`. Or a
            `Network` of a function and an `init_fn`; in training the function's own dropout is
            then off.
        inputs: example inputs, `[batch, ...]` or any pytree of such arrays; their shapes and dtypes
            matter.
        rates: for each layer by name, the probability to drop, in [0, 1). A name is that of a
            dropout layer, or the path of a layer whose weights make the units, as in "Dense_0". If
            a dropout layer drops the units, name the dropout layer. None: all dropout layers that
            drop units and are on in training, at their own rates. Other dropout layers, and
            attention layers, draw masks as before. A network made with
            `has_dropout=False` has none to thin, so name layers whose weights make the units.
        block_size: the largest number of neighbouring units that are kept or deleted together;
            larger blocks are faster. Each layer takes the largest divisor of its number of units
            that changes the fraction kept by at most 1/64. `network.step_rule.units` shows the
            block sizes. Inputs of the network are always kept or deleted one by one.
        shuffle: whether `fit` puts the units that are kept in blocks in a new order at the
            beginning of each epoch.
        scale: whether the kept units are scaled in training. If not, `jdrop.scale_weights` makes
            the weights for the test.

    Returns:
        The network, with a `ThinnedStep` as its `step_rule`.

    Raises:
        TypeError: a network that is not a `Network`; rates that are not a dictionary.
        ThinningError: a network that cannot be thinned, for instance because the units go through
            layer normalisation or a residual connection, or because the network computes with the
            number of its units; a rate that drops no unit.
        ValueError: a rate out of range; a name that is not a layer; a block size below 1; a module
            that its mode does not reach, see `jdrop.linen.as_network`.

    Example:
        >>> import flax.linen as nn, jdrop, jdrop.linen, optax
        >>> from jdrop import ensemble, thinned
        >>> class MLP(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.relu(nn.Dense(64)(x))
        ...         x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        ...         return nn.Dense(2)(x)
        >>> x, y = jnp.ones((6, 3)), jnp.zeros(6, int)
        >>> network = thinned.thin(jdrop.linen.as_network(MLP()), x[:1])
        >>> [(group.name, group.size, group.block_size) for group in network.step_rule.units]
        [('Dropout_0', 64, 16)]
        >>> init_key, fit_key = jax.random.split(jax.random.key(0))
        >>> state = ensemble.init_ensemble(init_key, network, optax.adam(0.1), x, ensemble_size=2)
        >>> state, losses = ensemble.fit_ensemble(fit_key, state, x, y, num_epochs=3, batch_size=2)
        >>> losses.shape
        (2, 3)

    Reference:
        Hinton et al. 2012, arXiv:1207.0580; Graham et al. 2015, arXiv:1502.02478.
    """
    requested_rates = _check_arguments(network, rates, block_size)
    inputs = jax.tree.map(jnp.asarray, inputs)
    variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
    layers = _read_layers(network, variables, inputs, requested_rates)
    chosen_rates = _choose_rates(layers, requested_rates)
    groups, unit_axes = _follow_layers(
        layers, chosen_rates, block_size, check_scale=scale, suggest_others=not requested_rates
    )
    step_rule = ThinnedStep(
        units=groups,
        axes=_axes_tree(variables, layers.program, unit_axes),
        shuffles=shuffle,
        scales=scale,
        network=network,
        switched_off=frozenset(requested_rates or {}).difference(chosen_rates),
    )
    _check_thinned(step_rule, layers.program, variables, inputs)
    return replace(network, step_rule=step_rule)


@dataclass(frozen=True)
class _Layers:
    """The layers of a network in training.

    Attributes:
        program: its operations.
        site_rates: the rate of each dropout layer that drops units and is on; None if traced.
        weight_indices: the index of each parameter among the leaves of the variables, by its path.
    """

    program: Program
    site_rates: dict[str, ArrayLike | None]
    weight_indices: dict[str, int]


def _check_arguments(network: Any, rates: Any, block_size: Any) -> dict[str, float] | None:
    """Checks what can be checked without a pass, and returns the rates as Python numbers."""
    if not isinstance(network, Network):
        raise TypeError(
            f"network must be a jdrop.network.Network, got {type(network).__name__}; make one "
            "with `jdrop.linen.as_network` or `jdrop.nnx.as_network`, or of a function with "
            "`Network(apply_fn, init_fn)`."
        )
    if not isinstance(block_size, numbers.Integral) or block_size < 1:
        raise ValueError(f"block_size must be an integer of at least 1, got {block_size!r}.")
    if rates is None:
        return None
    if not isinstance(rates, Mapping):
        raise TypeError(
            f"rates must be a dictionary of rates by the names of layers, got {rates!r}."
        )
    return {name: _check_rate(name, rate) for name, rate in rates.items()}


def _check_rate(name: str, rate: Any) -> float:
    """The rate of a layer, as a Python number."""
    if isinstance(rate, jax.Array | np.ndarray | None):
        raise ValueError(
            f"the rate of {name!r} must be a Python number, because the size of the thinned "
            "network depends on it, got an array; name the layer in `rates`, with a number."
        )
    try:
        return float(functional.check_rate(rate))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name!r}: {error}") from None


def _read_layers(
    network: Network,
    variables: Variables,
    inputs: Any,
    requested_rates: Mapping[str, float] | None,
) -> _Layers:
    """Reads the operations of a training pass, in which layers of a rate above 0 are tagged."""
    site_rates: dict[str, ArrayLike | None] = {}

    def tag(site: DropoutSite, inputs: Array) -> Array:
        site_rates[site.name] = None if isinstance(site.rate, jax.core.Tracer) else site.rate
        requested_rate = (requested_rates or {}).get(site.name, site.rate)
        rate = functional.check_rate(requested_rate, allow_one=True)
        return inputs if functional.is_number(rate, 0) else tag_dropout(site.name, inputs)

    program = read_program(replace_unit_dropout(network, tag), variables, inputs)
    weight_indices = {
        _weight_name(path): index
        for index, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(variables))
        if path[0].key == "params"
    }
    return _Layers(program, site_rates, weight_indices)


def _weight_name(path: tuple[Any, ...]) -> str:
    """The path of a weight, without `params` and without Flax's box around the array."""
    is_boxed = path[-1] == jax.tree_util.GetAttrKey("value")
    path = path[1:-1] if is_boxed else path[1:]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _choose_rates(layers: _Layers, requested_rates: Mapping[str, float] | None) -> dict[str, float]:
    """The layers to thin, with their rates: those requested, or the rates of dropout layers."""
    site_rates, weights = layers.site_rates, layers.weight_indices
    rates = requested_rates
    if rates is None:
        rates = {name: _check_rate(name, rate) for name, rate in site_rates.items()}
    for name in rates:
        if not {name, f"{name}/kernel"} & {*site_rates, *weights}:
            kernels = (path for path in weights if path.endswith("/kernel"))
            raise ValueError(
                f"rates names {name!r}, which is no layer of the network; its dropout layers are "
                f"{sorted(site_rates)}, its layers of weights "
                f"{sorted(path.removesuffix('/kernel') for path in kernels)}."
            )
    chosen = {name: rate for name, rate in rates.items() if rate > 0}
    if not chosen:
        raise ThinningError(
            "no layer is to be thinned: rates gives none a rate above 0."
            if requested_rates is not None
            else "no layer is to be thinned: the network has no dropout layer that is on in "
            "training, drops units and has a rate above 0; name layers and rates, as in "
            "rates={'Dense_0': 0.5}."
        )
    return chosen


def _follow_layers(
    layers: _Layers,
    rates: Mapping[str, float],
    block_size: int,
    *,
    check_scale: bool,
    suggest_others: bool,
) -> tuple[tuple[UnitGroup, ...], list[UnitAxis]]:
    """The units of every layer, and the axes of the network's arrays along which they lie."""
    groups, unit_axes = [], []
    for name, rate in rates.items():
        if name in layers.site_rates:
            try:
                group, axes = _follow_dropout(layers.program, name, rate, block_size)
            except ThinningError as error:
                others = _find_thinnable(layers.program, rates) if suggest_others else {}
                if not others:
                    raise
                raise ThinningError(
                    f"{error} Others can be thinned: rates={others}; those not named go on "
                    "drawing masks."
                ) from None
        else:
            group, axes = _follow_weights(layers, name, rate, block_size, check_scale=check_scale)
        if group.kept_blocks == group.num_blocks:
            raise ThinningError(f"{name}: a rate of {rate} drops none of its {group.size} units.")
        groups.append(group)
        unit_axes += axes
    return tuple(groups), unit_axes


def _find_thinnable(program: Program, rates: Mapping[str, float]) -> dict[str, float]:
    """The dropout layers that can be thinned, with their rates."""
    thinnable = {}
    for name, rate in rates.items():
        with contextlib.suppress(ThinningError):
            _follow_dropout(program, name, rate, block_size=1)
            thinnable[name] = rate
    return thinnable


def _follow_dropout(
    program: Program, name: str, rate: float, block_size: int
) -> tuple[UnitGroup, list[UnitAxis]]:
    """The units that a dropout layer drops, along its last axis, and the axes they lie along."""
    calls = program.dropout_calls.get(name, [])
    if not calls:
        raise ThinningError(
            f"{name}: it is called within a loop or a branch, in which no unit can be deleted; "
            "name a layer outside it in `rates`."
        )
    if len(calls) > 1:
        raise ThinningError(
            f"the dropout layer {name!r} is called more than once in a pass; give each call a "
            "layer of its own."
        )
    (inputs,), (outputs,) = calls[0].inputs, calls[0].outputs
    shape = program.shapes[outputs]
    if len(shape) < 2:
        raise ThinningError(
            f"{name}: its inputs have shape {shape}, without axes for examples and units."
        )
    size, is_input = shape[-1], not program.depends_on_variables(inputs)
    block_size = 1 if is_input else largest_block_size(size, rate, block_size)
    group = UnitGroup(name, size, rate, block_size, is_input, has_dropout=True)
    dropped = UnitAxis(outputs, len(shape) - 1, 1, reads=False, group=group)
    starts = [dropped] if is_input else [dropped, replace(dropped, array=inputs)]
    links = follow_units(program, starts)
    check_zeros(program, dropped, links)
    return group, [dropped, *(link.there for link in links)]


def _follow_weights(
    layers: _Layers, name: str, rate: float, block_size: int, *, check_scale: bool
) -> tuple[UnitGroup, list[UnitAxis]]:
    """The units that weights make, along their last axis, and the axes they lie along."""
    program, weights = layers.program, layers.weight_indices
    index = weights[f"{name}/kernel"] if f"{name}/kernel" in weights else weights[name]
    array = program.leaves[index]
    shape = program.shapes[array]
    if not shape:
        raise ThinningError(f"{name}: it is a single number, which makes no units.")
    block_size = largest_block_size(shape[-1], rate, block_size)
    group = UnitGroup(name, shape[-1], rate, block_size, is_input=False, has_dropout=False)
    made = UnitAxis(array, len(shape) - 1, 1, reads=False, group=group)
    links = follow_units(program, [made])
    if check_scale:
        check_scales(links)
    return group, [made, *(link.there for link in links)]


def _axes_tree(
    variables: Variables, program: Program, unit_axes: Sequence[UnitAxis]
) -> UnitAxesTree:
    """A tree like the variables, of the axes along which units lie in each array."""
    leaves, tree = jax.tree.flatten(variables)
    axes_of: dict[int, list[UnitAxis]] = {}
    for unit_axis in unit_axes:
        axes_of.setdefault(unit_axis.array, []).append(unit_axis)
    return jax.tree.unflatten(
        tree,
        [
            UnitAxes(_one_per_axis(axes_of.get(array, [])), leaf.shape)
            for array, leaf in zip(program.leaves, leaves, strict=True)
        ],
    )


def _one_per_axis(unit_axes: Sequence[UnitAxis]) -> tuple[UnitAxis, ...]:
    """The axes of one array in order; raises if units lie along one axis in two ways."""
    by_axis: dict[int, UnitAxis] = {}
    # Weights that read the units go last, so that they prevail over weights that make them.
    for unit_axis in sorted(unit_axes, key=lambda unit_axis: unit_axis.reads):
        other = by_axis.setdefault(unit_axis.axis, unit_axis)
        if other.group != unit_axis.group:
            raise ThinningError(
                f"{other.group.name} and {unit_axis.group.name} name the same units; give one of "
                "them."
            )
        if other.inner != unit_axis.inner:
            raise ThinningError(f"{other.group.name}: an array holds its units in two orders.")
        by_axis[unit_axis.axis] = unit_axis
    return tuple(by_axis[axis] for axis in sorted(by_axis))


def _check_thinned(
    step_rule: ThinnedStep, program: Program, variables: Variables, inputs: Any
) -> None:
    """Raises if the network does not run with fewer units, or computes with their number."""
    kept = {group.name: jnp.arange(group.kept_blocks) for group in step_rule.units}
    thinned_network = step_rule.thinned_network(kept)

    def take(variables: Variables) -> Variables:
        return step_rule.take(step_rule.axes, variables, kept)

    def train(variables: Variables, inputs: Any) -> tuple[Any, Variables]:
        return thinned_network.apply_train(variables, inputs, jax.random.key(0))

    thinned_variables = jax.eval_shape(take, variables)
    try:
        jax.eval_shape(train, thinned_variables, inputs)
    except Exception as error:
        raise ThinningError(
            "the network does not run with fewer units; what it computes may take their number "
            f"only from the arrays that it is given: {error}"
        ) from error

    kept_inputs = {group.name: group.kept_blocks for group in step_rule.units if group.is_input}

    def slice_inputs(site: DropoutSite, inputs: Array) -> Array:
        return inputs[..., : kept_inputs.get(site.name)]

    without_dropout = replace_unit_dropout(step_rule.network, slice_inputs)
    thinned_program = read_program(without_dropout, thinned_variables, inputs)
    for full, thinned in itertools.zip_longest(program.scalars, thinned_program.scalars):
        if full != thinned:
            raise ThinningError(
                f"the network computes with the number of its units: where it takes {full}, with "
                f"fewer of them it takes {thinned}. Write such a factor as a fixed number."
            )
