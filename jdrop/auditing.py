"""The audit of a network: each place where it drops something, and what is wrong with it."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import InvalidRngError
from jax import Array
from jax.typing import ArrayLike

import jdrop.linen
import jdrop.nnx
from jdrop import functional
from jdrop.draws import Draw, read_draws, tag
from jdrop.network import DropoutSite, Network

__all__ = ["Audit", "AuditedSite", "audit"]


@dataclass(frozen=True)
class AuditedSite:
    """A place where a network drops something.

    Attributes:
        name: the path of the layer, for instance "block/Dropout_0"; then "#2" for its second call
            in a pass. For a draw that belongs to no layer, the path of the module, if it is known,
            and the line of the program.
        kind: whose layer it is, "jdrop" or "Flax"; or "hand-written".
        rate: the probability to drop; None: unknown, or computed in the pass.
        shape: of what it drops; None: unknown.
        broadcast_dims: the axes along which elements share one decision.
        on_in_training: whether it draws in a training pass.
        on_in_evaluation: whether it draws in a pass without a key; None: unknown, because the pass
            failed before.
        shares_key_with: the names of other sites that draw from the same key.
        read_by: the paths of the next layers with weights that read its output; "outputs" stands
            for those of the network. Empty: nothing reads it, or it is attention without dropout.
    """

    name: str
    kind: str
    rate: ArrayLike | None
    shape: tuple[Any, ...] | None
    broadcast_dims: tuple[int, ...]
    on_in_training: bool
    on_in_evaluation: bool | None
    shares_key_with: tuple[str, ...]
    read_by: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """What `jdrop.audit` found; as text, a table of the sites and a list of the faults.

    Attributes:
        sites: the places where the network drops something.
        faults: a sentence for each fault.
    """

    sites: tuple[AuditedSite, ...]
    faults: tuple[str, ...]

    def __str__(self) -> str:
        titles = "site", "kind", "rate", "shape", "broadcast", "training", "evaluation", "key"
        rows = [(*titles, "read by"), *map(_cells, self.sites)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        faults = [f"- {fault}" for fault in self.faults] or ["No faults."]
        return "\n".join([*(table if self.sites else ["No dropout."]), "", *faults])


def _cells(site: AuditedSite) -> tuple[str, ...]:
    """The row of a site in the table."""
    modes = {True: "on", False: "off", None: "?"}
    rate = "?"
    if site.rate is not None:
        rate = "by element" if jnp.ndim(site.rate) else f"{site.rate:g}"
    key = "own" if site.on_in_training else "-"
    return (
        site.name,
        site.kind,
        rate,
        "?" if site.shape is None else "x".join(map(str, site.shape)) or "scalar",
        ",".join(map(str, site.broadcast_dims)) or "-",
        modes[site.on_in_training],
        modes[site.on_in_evaluation],
        "shared" if site.shares_key_with else key,
        ", ".join(site.read_by) or "-",
    )


def audit(network: Any, inputs: Any) -> Audit:
    """Lists every place where a network drops something, and what is wrong with it.

    The network is traced in a training pass and in a pass without a key; nothing is computed.
    These are faults:

    - a layer that is never on, that is on in evaluation too, or that is on in evaluation only;
    - a key that several sites share: where their shapes are equal, so are their masks;
    - a key that all turns of a loop share, as in `nn.scan` without `split_rngs`;
    - a key that is the same in every pass;
    - random numbers that belong to no dropout layer, such as a mask that the module draws itself:
      what replaces dropout layers, such as `jdrop.compare`, leaves them as they are.

    Args:
        network: a `jdrop.network.Network`, a linen module, an nnx module, or a function of `rngs`
            that makes one. `as_network` makes the network of a module.
        inputs: arrays, or their shapes and dtypes.

    Raises:
        TypeError: a network of another type.
        ValueError: a network without an `init_fn` or a `replace_fn`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jdrop
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train=False):
        ...         x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(8)(x))
        ...         return nn.Dropout(0.1, deterministic=True)(nn.Dense(2)(x))
        >>> print(jdrop.audit(Net(), jax.ShapeDtypeStruct((4, 3), jnp.float32)))
        site       kind  rate  shape  broadcast  training  evaluation  key  read by
        Dropout_0  Flax  0.5   4x8    -          on        off         own  Dense_1
        Dropout_1  Flax  0.1   4x2    -          off       off         -    outputs
        <BLANKLINE>
        - Never on, since off in training too: Dropout_1.
    """
    network = _as_network(network)
    key = jax.random.key(0)
    # A network with a replacement is not checked, so that the audit describes what is wrong.
    unchecked = network.replace_dropout(lambda site, inputs: None, attention_dropout=True)
    variables = jax.eval_shape(unchecked.init, key, inputs)

    training = _Pass(draws_masks=True)
    training.trace(training.tagged(network).apply_train, variables, inputs, key)

    evaluation, refusal = _Pass(draws_masks=False), ""
    network_without_key = evaluation.tagged(network).apply_fn

    def evaluate(variables: Any, inputs: Any) -> Any:
        return network_without_key(variables, inputs, None)

    try:
        evaluation.trace(evaluate, variables, inputs)
    except InvalidRngError as error:
        refusal = str(error).partition(" (https")[0]

    places = training.places()
    known = {place.layer for place in places}
    only_in_evaluation = [place for place in evaluation.places() if place.layer not in known]
    sites = [_audited(place, places, evaluation, bool(refusal)) for place in places]
    sites += [_audited(place, [], evaluation, False) for place in only_in_evaluation]
    return Audit(tuple(sites), tuple(_faults(sites, places, refusal)))


def _as_network(network: Any) -> Network:
    if isinstance(network, Network):
        return network
    is_linen_class = isinstance(network, type) and issubclass(network, nn.Module)
    if isinstance(network, nn.Module) or is_linen_class:
        return jdrop.linen.as_network(network)
    if isinstance(network, nnx.Module):
        return jdrop.nnx.as_network(lambda rngs: nnx.clone(network))
    if callable(network):
        return jdrop.nnx.as_network(network)
    raise TypeError(
        "network must be a Network, a module or a function of rngs that makes one, got "
        f"{type(network).__name__}; make one with `jdrop.linen.as_network` or "
        "`jdrop.nnx.as_network`."
    )


@dataclass(frozen=True)
class _Place:
    """A call of a dropout or attention layer, or a draw that belongs to none.

    Attributes:
        name: as in `AuditedSite`.
        layer: the name without the number of the call.
        is_on: whether it draws in the pass.
        site: the call of the layer; None: there is no layer.
        draws: what it draws.
        read_by: as in `AuditedSite`.
    """

    name: str
    layer: str
    is_on: bool
    site: DropoutSite | None
    draws: tuple[Draw, ...]
    read_by: tuple[str, ...]


@dataclass(eq=False)
class _Pass:
    """What a pass of a network draws.

    Attributes:
        draws_masks: whether the pass has a key.
        calls: of layers, in the order in which they were traced. The index of a call is its tag.
        untagged: the calls that leave no tag: attention layers that drop nothing.
        draws: in the jaxpr of the pass.
        read_by: the tags of the calls in the jaxpr, and the layers that read each.
    """

    draws_masks: bool
    calls: list[DropoutSite] = field(default_factory=list)
    untagged: list[int] = field(default_factory=list)
    draws: tuple[Draw, ...] = ()
    read_by: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def tagged(self, network: Network) -> Network:
        """The network with layers that leave tags in the jaxpr."""
        return network.replace_dropout(self._drop, attention_dropout=self._choose_key)

    def trace(self, function: Callable[..., Any], variables: Any, *arguments: Any) -> None:
        """Traces the pass, and keeps what reaches its outputs."""
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
        found = read_draws(function, variables, *arguments, weights=[*map(_owner, paths)])
        self.draws = found.draws
        read_by = {**found.tags, **{draw.tag: draw.read_by for draw in found.draws if draw.tag}}
        self.read_by = {int(name): layers for name, layers in read_by.items()}

    def _drop(self, site: DropoutSite, inputs: Array) -> Array:
        """Drops as the layer would, but from a tagged key; or tags the inputs."""
        name, is_on = self._note(site)
        rate = functional.check_rate(site.rate, allow_one=True)
        if not self.draws_masks or not is_on:
            return tag(inputs, name)
        if functional.is_number(rate, 1):
            return tag(jnp.zeros_like(inputs), name)
        key = tag(functional.as_key(site.make_key()), name)
        return functional.dropout(key, inputs, rate, broadcast_dims=site.broadcast_dims)

    def _choose_key(self, site: DropoutSite) -> Array | None:
        """The tagged key with which an attention layer drops."""
        name, is_on = self._note(site)
        if self.draws_masks and is_on:
            return tag(functional.as_key(site.make_key()), name)
        self.untagged.append(int(name))
        return None

    def _note(self, site: DropoutSite) -> tuple[str, bool]:
        """Keeps a call; returns its tag, and whether it is switched on."""
        is_traced = isinstance(site.rate, jax.core.Tracer)
        rate = math.nan if is_traced else functional.check_rate(site.rate, allow_one=True)
        self.calls.append(replace(site, rate=rate))
        return str(len(self.calls) - 1), _is_on(self.calls[-1])

    def places(self) -> list[_Place]:
        """The calls and draws that reach the outputs."""
        # JAX can trace the body of a loop several times, and the jaxpr has only the last of them.
        # A call without a tag counts once for each layer.
        first_untagged = {self.calls[i].name: i for i in reversed(self.untagged)}
        places = []
        for index in sorted({*self.read_by, *first_untagged.values()}):
            site, read_by = self.calls[index], self.read_by.get(index, ())
            draws = tuple(draw for draw in self.draws if draw.tag == str(index))
            places.append(_Place("", _layer_of(site), _is_on(site), site, draws, read_by))
        by_hand = [draw for draw in self.draws if not draw.tag]
        places += [_Place("", _line_of(d), True, None, (d,), d.read_by) for d in by_hand]
        count: Counter[str] = Counter()
        for index, place in enumerate(places):
            count[place.layer] += 1
            number = f" #{count[place.layer]}" if count[place.layer] > 1 else ""
            places[index] = replace(place, name=place.layer + number)
        return places

    def is_on(self, layer: str) -> bool | None:
        """Whether a layer or a line draws in this pass; None: the pass does not come to it."""
        modes = [_is_on(site) for site in self.calls if _layer_of(site) == layer]
        modes += [True for draw in self.draws if not draw.tag and _line_of(draw) == layer]
        return any(modes) if modes else None


def _is_on(site: DropoutSite) -> bool:
    return not site.deterministic and not _is_zero(site.rate)


def _is_zero(rate: Any) -> bool:
    return isinstance(rate, float) and rate == 0


def _layer_of(site: DropoutSite) -> str:
    return site.name or "the network"


def _line_of(draw: Draw) -> str:
    """Where a draw is that belongs to no layer: the path of its module, and the line."""
    # The path begins with the class of the whole module, which the paths of layers leave out.
    return replace(draw, path=draw.path.partition("/")[2]).place or "the network"


def _owner(path: tuple[Any, ...]) -> str:
    """The path of the layer to which a weight belongs, or the name of a weight of the network."""
    keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    return "/".join(keys[1:-1] or keys[1:] or keys) or "the network"


def _audited(
    place: _Place, places: Sequence[_Place], evaluation: _Pass, failed: bool
) -> AuditedSite:
    """Describes a place.

    Args:
        place: the place.
        places: of the training pass.
        evaluation: the pass without a key.
        failed: whether that pass failed, and so may have come to only some layers.
    """
    on_in_evaluation = evaluation.is_on(place.layer)
    if on_in_evaluation is None and not failed:
        on_in_evaluation = False
    keys = {draw.key for draw in place.draws}
    site = place.site
    is_unknown = site is None or (isinstance(site.rate, float) and math.isnan(site.rate))
    return AuditedSite(
        name=place.name,
        kind=_kind(site),
        rate=None if site is None or is_unknown else site.rate,
        shape=place.draws[0].shape if site is None else site.shape,
        broadcast_dims=() if site is None else site.broadcast_dims,
        on_in_training=place.is_on and place in places,
        on_in_evaluation=on_in_evaluation,
        shares_key_with=tuple(
            other.name
            for other in places
            if other is not place and not keys.isdisjoint(draw.key for draw in other.draws)
        ),
        read_by=place.read_by,
    )


def _kind(site: DropoutSite | None) -> str:
    if site is None:
        return "hand-written"
    bases = () if site.layer_class is None else site.layer_class.__mro__
    is_ours = any(base.__module__.partition(".")[0] == "jdrop" for base in bases)
    return "jdrop" if is_ours else "Flax"


def _faults(sites: Sequence[AuditedSite], places: Sequence[_Place], refusal: str) -> Iterator[str]:
    """A sentence for each fault.

    Args:
        sites: all of them.
        places: of the training pass.
        refusal: the error of the pass without a key.
    """

    def named(fault: str, names: Sequence[str]) -> Iterator[str]:
        if names:
            *others, last = names
            yield fault.format(f"{', '.join(others)} and {last}" if others else last)

    on, off = (True, True), (False, False)
    modes = {site.name: (site.on_in_training, bool(site.on_in_evaluation)) for site in sites}
    always = [name for name, mode in modes.items() if mode == on]
    inverted = [name for name, mode in modes.items() if mode == (False, True)]
    never = [site.name for site in sites if modes[site.name] == off and not _is_zero(site.rate)]
    yield from named("Never on, since off in training too: {}.", never)
    yield from named("Always on, since on in evaluation too: {}.", always)
    yield from named("On in evaluation only, so the mode is inverted: {}.", inverted)

    groups = dict.fromkeys(
        tuple(name for name in modes if name in (site.name, *site.shares_key_with))
        for site in sites
        if site.shares_key_with
    )
    for group in groups:
        yield from named(
            "The same key, and so the same mask where the shapes are equal: {}.", group
        )
    repeated = [place.name for place in places if any(d.num_turns != 1 for d in place.draws)]
    yield from named("One key, and so one mask, for all turns of a loop: {}.", repeated)
    constant = [place.name for place in places if any(d.is_constant for d in place.draws)]
    yield from named("A key that is the same in every pass: {}.", constant)
    by_hand = [site.name for site in sites if site.kind == "hand-written"]
    yield from named(
        "Random numbers that belong to no dropout layer, so that nothing can replace them: {}.",
        by_hand,
    )
    if refusal:
        yield f"An evaluation draws, and has no key: {refusal}."
