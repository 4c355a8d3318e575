"""Takes the kept units of a network out, with all that belongs to them, and puts them back."""

import contextlib
import itertools
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jdrop import functional
from jdrop.network import Network, Variables
from jdrop.thinned import blocks
from jdrop.thinned.blocks import Kept
from jdrop.thinned.optimizer import map_state
from jdrop.thinned.structure import Place, Structure, ThinningError, mark

MAX_DEVIATION = 1 / 64
"""By how much blocks may change the share of the units that are kept."""


@dataclass(frozen=True)
class Units:
    """The units of one layer, and how many of them are kept.

    Attributes:
        name: of the dropout layer, or of the layer of weights.
        size: how many there are.
        rate: the probability to drop, as asked for.
        block_size: so many neighbours are kept or dropped together.
        is_input: whether they are the inputs of the network.
        is_site: whether a dropout layer stands at them.
    """

    name: str
    size: int
    rate: float
    block_size: int
    is_input: bool
    is_site: bool

    @property
    def num_blocks(self) -> int:
        """Of which some are kept."""
        return self.size // self.block_size

    @property
    def kept_blocks(self) -> int:
        """How many are kept of them, in every draw."""
        return max(1, round((1 - self.rate) * self.num_blocks))

    @property
    def scale(self) -> float:
        """What makes up for the dropped units: one over the share of those kept."""
        return self.num_blocks / self.kept_blocks


@dataclass(frozen=True)
class Places:
    """Where units of thinned layers are in an array of that shape, by axis; a leaf of a tree."""

    of: tuple[Place, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Thinning:
    """How a network is thinned; `thin` makes it.

    Attributes:
        units: the layers whose units are dropped.
        places: `Places` for every array of the variables.
        num_groups: into how many groups a batch is divided, each with a draw of its own.
        shuffles: whether the order of units changes at the beginning of each epoch.
        scales: whether what is kept is scaled in training.
        own: the network that is thinned.
    """

    units: tuple[Units, ...]
    places: Variables
    num_groups: int
    shuffles: bool
    scales: bool
    own: Network
    _without: frozenset[str]

    def draw(self, key: Array) -> Kept:
        """Draws which blocks of units are kept: every choice of so many has equal probability."""
        kept = {}
        for index, units in enumerate(self.units):
            order = jax.random.permutation(jax.random.fold_in(key, index), units.num_blocks)
            kept[units.name] = jnp.sort(order[: units.kept_blocks])
        return kept

    def take(self, places: Any, tree: Any, kept: Kept) -> Any:
        """The arrays of a tree without what belongs to dropped units."""

        def of_array(places: Places, array: Array) -> Array:
            if places.of and array.shape != places.shape:
                raise ThinningError(
                    f"an array has shape {array.shape} where `thin` found {places.shape}; give "
                    "`thin` inputs of the shape of those in training."
                )
            return blocks.take(array, self._cuts(places), kept)

        return jax.tree.map(of_array, places, tree)

    def put(self, places: Any, tree: Any, part: Any, kept: Kept) -> Any:
        """The arrays of a tree with what belongs to kept units from `part`."""

        def of_array(places: Places, array: Array, part: Array) -> Array:
            return blocks.put(array, part, self._cuts(places), kept)

        return jax.tree.map(of_array, places, tree, part)

    def entries(self, kept: Kept) -> Any:
        """For each parameter, True where entries belong to kept units; broadcastable to it."""

        def of_array(places: Places) -> Array:
            of_all = jnp.ones((1,) * len(places.shape), bool)
            for cut in self._cuts(places):
                of_axis = blocks.is_kept(cut, kept).repeat(cut.width)
                of_axis = jnp.tile(of_axis, places.shape[cut.axis] // of_axis.size)
                others = [axis for axis in range(len(places.shape)) if axis != cut.axis]
                of_all &= jnp.expand_dims(of_axis, others)
            return of_all

        return jax.tree.map(of_array, self.places["params"])

    def places_in_state(
        self, optimizer: optax.GradientTransformation, opt_state: Any, params: Any
    ) -> Any:
        """`Places` for every array of an optimizer's state: those of the parameter it is for.

        Raises:
            ThinningError: a state of which no part can be taken out.
        """
        places = self.places["params"]
        return map_state(optimizer, lambda leaf, of: of, opt_state, params, places, Places())

    def network(self, kept: Kept) -> Network:
        """The thinned network, of the variables that `take` gives."""
        by_name = {units.name: units for units in self.units if units.is_site}

        def at_dropout(name: str, x: Array, rate: ArrayLike) -> Array | None:
            if name not in by_name:
                return x if name in self._without else None
            units = by_name[name]
            if units.is_input:
                x = x[..., kept[name]]
            return _scaled(x, units.scale) if self.scales else x

        def scale_of(places: Places) -> float:
            read = (self.units[place.units] for place in places.of if place.reads)
            scales = (units.scale for units in read if self.scales and not units.is_site)
            return math.prod(scales, start=1.0)

        def scaled(places: Places, array: Array) -> Array:
            scale = scale_of(places)
            return array if scale == 1 else _scaled(array, scale)

        def restored(places: Places, before: Array, after: Array) -> Array:
            return after if scale_of(places) == 1 else before

        def train(variables: Variables, inputs: Array, key: Array) -> tuple[Array, Variables]:
            read = jax.tree.map(scaled, self.places, variables)
            outputs, after = thinned.apply_train(read, inputs, key)
            return outputs, jax.tree.map(restored, self.places, variables, after)

        thinned = _own_dropout_replaced(self.own, at_dropout)
        return Network(thinned.apply_fn, train_fn=train)

    def shuffled(self, key: Array, places: Any, tree: Any) -> Any:
        """The arrays of a tree with the hidden units of each layer in another order.

        The function of the network is the same, and neighbours, which are dropped together, are
        others.
        """
        order = {
            units.name: jax.random.permutation(jax.random.fold_in(key, index), units.size)
            for index, units in enumerate(self.units)
            if units.block_size > 1
        }

        def of_array(places: Places, array: Array) -> Array:
            cuts = [
                blocks.Cut(units.name, place.axis, units.size, place.inner)
                for place in places.of
                if (units := self.units[place.units]).name in order
            ]
            return blocks.take(array, cuts, order)

        return jax.tree.map(of_array, places, tree)

    def _cuts(self, places: Places) -> list[blocks.Cut]:
        return [
            blocks.Cut(units.name, place.axis, units.num_blocks, units.block_size * place.inner)
            for place in places.of
            for units in [self.units[place.units]]
        ]


def _scaled(x: Array, scale: float) -> Array:
    """`x * scale`, rounded once."""
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * scale).astype(x.dtype)


def _own_dropout_replaced(network: Network, at_dropout: Any) -> Network:
    """The network with dropout layers replaced; one that says nothing of its layers, without."""
    if network.thin is not None:
        return network.thin(at_dropout)
    return Network(lambda variables, inputs, key: network.apply_fn(variables, inputs, None))


def thin(
    network: Any,
    inputs: ArrayLike,
    rates: Mapping[str, ArrayLike] | None = None,
    *,
    block_size: int = 16,
    num_groups: int = 1,
    shuffle: bool = True,
    scale: bool = True,
) -> Network:
    r"""A network whose training steps train thinned networks at their real size.

    In each step some units of each layer are deleted, the smaller network is trained, and the
    deleted units are put back as they were, weights, statistics and moments of the optimizer
    included. Of `n` blocks of units exactly `round((1 - rate) n)` are kept, of single units
    (`block_size=1`) as many; what they give to the next layer is divided by the share that is
    kept.

    It is thinned by what trains a network: `jdrop.train.train_step` and `fit`,
    `jdrop.ensemble.fit_ensemble`, `jdrop.compare`. To call it, without a key or with one, is to
    call the network that it was. Optimizers that look at many entries at once, by their norm or
    as a matrix (LAMB, Muon, clipping by the global norm), see those of the thinned network.

    Args:
        network: what `jdrop.linen.as_network` or `jdrop.nnx.as_network` made, or a `Network` of a
            function and an `init_fn`, which is then trained with the function's own dropout off.
        inputs: example inputs, `[batch, ...]`; their shape and dtype matter.
        rates: by name, the probability to drop, in [0, 1). A name is that of a dropout layer, or
            the path of a layer whose weights make the units, as in "Dense_0". Without it, all
            dropout layers of the module at their own rates. Dropout layers not named go on
            drawing masks as ever; attention layers too, and layers that decide for all units at
            once (`broadcast_dims`). Layers that are off in training stay off. Of units that a
            dropout layer drops, name that one.
        block_size: at most so many neighbouring units are kept or deleted together, which is
            faster: the largest divisor of the number of units with which the share kept stays
            within 1/64. `network.thinning.units` says what it is, and how many are kept, one at
            least. Inputs, which are dropped where a dropout layer stands at them, are taken one by
            one.
        num_groups: into how many groups a batch is divided, each with a draw of its own. With more
            than one, the optimizer goes through all weights.
        shuffle: whether `fit` changes the order of the units in blocks at the beginning of each
            epoch, so that other units become neighbours.
        scale: whether what is kept is scaled in training. Without it, `jdrop.scale_weights` makes
            the weights for the test.

    Raises:
        TypeError: a network that is not a `Network`; rates that are no dictionary.
        ThinningError: a network of which no part can be trained alone, as when units go through
            layer normalisation or a residual connection, or the network computes with their
            number; a rate that drops no unit.
        ValueError: a rate out of range; a name that is no layer; sizes below 1.

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
        >>> init_key, fit_key = jax.random.split(jax.random.key(0))
        >>> state = ensemble.init_ensemble(init_key, network, optax.adam(0.1), x, ensemble_size=2)
        >>> state, losses = ensemble.fit_ensemble(fit_key, state, x, y, num_epochs=3, batch_size=2)
        >>> losses.shape
        (2, 3)

    Reference:
        Hinton et al. 2012, arXiv:1207.0580; Graham et al. 2015, arXiv:1502.02478.
    """
    if not isinstance(network, Network):
        raise TypeError(
            f"network must be a jdrop.network.Network, got {type(network).__name__}; make one "
            "with `jdrop.linen.as_network` or `jdrop.nnx.as_network`, or of a function with "
            "`Network(apply_fn, init_fn)`."
        )
    for name, value in (("block_size", block_size), ("num_groups", num_groups)):
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    asked = None
    if rates is not None:
        if not isinstance(rates, Mapping):
            raise TypeError(
                f"rates must be a dictionary of rates by the names of layers, got {rates!r}."
            )
        asked = {name: _checked(name, rate) for name, rate in rates.items()}
    inputs = jnp.asarray(inputs)
    variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
    structure, own_rates = _read(network, variables, inputs, asked or {})
    if num_groups > 1 and structure.changes_state:
        raise ThinningError(
            f"num_groups must be 1, got {num_groups}: the network changes its state in training, "
            "as batch normalisation does, and the groups would each change it in their own way."
        )
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(variables), strict=True)
    leaf_of = {
        jax.tree_util.keystr(path[1:], simple=True, separator="/"): number
        for number, path in enumerate(paths)
        if path[0].key == "params"
    }
    chosen = _chosen(asked, own_rates, leaf_of)
    places: list[list[Place]] = [[] for _ in leaves]
    all_units = []
    for number, (name, rate) in enumerate(chosen.items()):
        is_site = name in own_rates
        if is_site:
            try:
                found = structure.units_of_site(number, name)
            except ThinningError as error:
                others = {} if asked else _thinnable(structure, chosen)
                way_out = (
                    f" Others can be thinned: rates={others}; those not named go on drawing masks."
                )
                raise ThinningError(f"{error}{way_out * bool(others)}") from None
        else:
            leaf = leaf_of.get(f"{name}/kernel", leaf_of.get(name))
            assert leaf is not None
            found = structure.units_of_leaf(number, name, leaf, scaled=scale)
        for leaf, at_leaf in found.places.items():
            places[leaf] += at_leaf
        size = _block_size(name, found.size, rate, 1 if found.is_input else block_size)
        all_units.append(Units(name, found.size, rate, size, found.is_input, is_site))
    of_leaves = []
    for leaf, at_leaf in zip(leaves, places, strict=True):
        if len({place.axis for place in at_leaf}) < len(
            {(p.units, p.axis, p.inner) for p in at_leaf}
        ):
            names = dict.fromkeys(all_units[place.units].name for place in at_leaf)
            raise ThinningError(
                f"{' and '.join(names)} name the same units; give one of them."
                if len(names) > 1
                else f"{names.popitem()[0]}: an array holds its units in two orders."
            )
        by_axis = {place.axis: place for place in at_leaf}
        of_leaves.append(Places(tuple(by_axis[axis] for axis in sorted(by_axis)), leaf.shape))
    tree = jax.tree.unflatten(jax.tree.structure(variables), of_leaves)
    without = frozenset(asked or {}).difference(chosen)
    thinning = Thinning(tuple(all_units), tree, num_groups, shuffle, scale, network, without)
    _check_sizes(thinning, structure, variables, inputs)
    return replace(network, thinning=thinning)


def _thinnable(structure: Structure, chosen: Mapping[str, float]) -> dict[str, float]:
    """Those of the dropout layers that can be thinned."""
    found = {}
    for name, rate in chosen.items():
        with contextlib.suppress(ThinningError):
            structure.units_of_site(0, name)
            found[name] = rate
    return found


def _check_sizes(
    thinning: Thinning, structure: Structure, variables: Variables, inputs: Array
) -> None:
    """Raises where the network does not run with fewer units, or computes with their number."""
    kept = {units.name: jnp.arange(units.kept_blocks) for units in thinning.units}

    def take(variables: Variables) -> Variables:
        return thinning.take(thinning.places, variables, kept)

    def train(variables: Variables, inputs: Array) -> tuple[Array, Variables]:
        return thinning.network(kept).apply_train(variables, inputs, jax.random.key(0))

    part = jax.eval_shape(take, variables)
    try:
        jax.eval_shape(train, part, inputs)
    except Exception as error:
        raise ThinningError(
            "the network does not run with fewer units; what it computes may take their number "
            f"only from the arrays that it is given: {error}"
        ) from error

    of_inputs = {units.name: units.kept_blocks for units in thinning.units if units.is_input}

    def at_dropout(name: str, x: Array, rate: ArrayLike) -> Array:
        return x[..., : of_inputs.get(name)]

    found = _structure(_own_dropout_replaced(thinning.own, at_dropout), part, inputs)
    for full, thinned in itertools.zip_longest(structure.numbers, found.numbers):
        if full != thinned:
            raise ThinningError(
                f"the network computes with the number of its units: where it takes {full}, with "
                f"fewer of them it takes {thinned}. Write such a factor as a fixed number."
            )


def _read(
    network: Network, variables: Variables, inputs: Array, rates: Mapping[str, ArrayLike]
) -> tuple[Structure, dict[str, ArrayLike | None]]:
    """The structure of a network in training, and its dropout layers with their rates."""
    own_rates: dict[str, ArrayLike | None] = {}

    def at_dropout(name: str, x: Array, rate: ArrayLike) -> Array:
        own_rates[name] = None if isinstance(rate, jax.core.Tracer) else rate
        asked = functional.check_rate(rates.get(name, rate), allow_one=True)
        return x if functional.is_static(asked, 0) else mark(name, x)

    return _structure(_own_dropout_replaced(network, at_dropout), variables, inputs), own_rates


def _structure(network: Network, variables: Variables, inputs: Array) -> Structure:
    """Of the network in training."""
    leaves, tree = jax.tree.flatten(variables)

    def train(leaves: list[Array], inputs: Array) -> tuple[Array, list[Array]]:
        before = jax.tree.unflatten(tree, leaves)
        outputs, after = network.apply_train(before, inputs, jax.random.key(0))
        return outputs, jax.tree.leaves(after)

    return Structure(jax.make_jaxpr(train)(leaves, inputs), len(leaves))


def _chosen(
    asked: Mapping[str, float] | None,
    own_rates: Mapping[str, ArrayLike | None],
    leaf_of: Mapping[str, int],
) -> dict[str, float]:
    """The layers to thin and their rates: those asked for, or the dropout layers' own."""
    rates = asked
    if rates is None:
        rates = {name: _checked(name, rate) for name, rate in own_rates.items()}
    for name in rates:
        if not {name, f"{name}/kernel"} & {*own_rates, *leaf_of}:
            layers = (leaf.removesuffix("/kernel") for leaf in leaf_of if leaf.endswith("/kernel"))
            raise ValueError(
                f"rates names {name!r}, which is no layer of the network; its dropout layers are "
                f"{sorted(own_rates)}, its layers of weights {sorted(layers)}."
            )
    chosen = {name: rate for name, rate in rates.items() if rate > 0}
    if not chosen:
        raise ThinningError(
            "no layer is to be thinned: rates gives none a rate above 0."
            if asked is not None
            else "no layer is to be thinned: the network has no dropout layer that is on in "
            "training, drops units and has a rate above 0; name layers and rates, as in "
            "rates={'Dense_0': 0.5}."
        )
    return chosen


def _checked(name: str, rate: Any) -> float:
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


def _block_size(name: str, size: int, rate: float, at_most: int) -> int:
    """The largest size of blocks that keeps the share of kept units; see `thin`."""
    share = max(1, round((1 - rate) * size)) / size
    if share == 1:
        raise ThinningError(f"{name}: a rate of {rate} drops none of its {size} units.")
    for block_size in range(min(at_most, size), 1, -1):
        if size % block_size == 0:
            units = Units(name, size, rate, block_size, is_input=False, is_site=False)
            if abs(1 / units.scale - share) <= MAX_DEVIATION and units.scale > 1:
                return block_size
    return 1
