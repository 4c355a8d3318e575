"""A network, as the rest of jdrop sees it: a function of variables, inputs and a key.

`Network` comes first. The functions after it read networks: their sites, masks and predictions.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import get_opaque_trace_state
from jax.typing import ArrayLike

from jdrop import functional, stochastic_depth
from jdrop.dependence import trace
from jdrop.sites import AttentionDropout, DropoutSite, ReplaceFn

__all__ = [
    "ApplyFn",
    "DropoutSite",
    "Network",
    "ReplaceFn",
    "StepRule",
    "Variables",
    "consumed_keys",
    "dropout_sites",
    "predict",
    "record_masks",
    "replay_masks",
]

Variables = dict[str, Any]
"""Collections of arrays: `params` is trained, the other collections are state."""

ApplyFn = Callable[[Variables, Any, Array | None], Any]
"""`apply_fn(variables, inputs, key)` -> outputs, `[batch, class]` for a classifier.

Inputs are an array `[batch, ...]`, or any pytree of such arrays. So are the outputs in training; a
prediction must be one array.

With a key the network draws masks; `key=None` is the deterministic network. The presence of the
key is the mode, so no flag can contradict it.
"""


@runtime_checkable
class StepRule(Protocol):
    """How the training of a network differs from the ordinary one.

    `jdrop.train.fit` and `train_step` call the rule of a network with their `TrainState`.
    """

    def start_epoch(self, key: Array, state: Any) -> Any:
        """Returns the state with which an epoch starts; the key is consumed."""

    def step(self, key: Array, state: Any, batch: Any) -> tuple[Any, Array]:
        """Returns the state after a step, and the mean loss before it; the key is consumed."""


@dataclass(frozen=True)
class Network:
    """An `apply_fn`, and how to initialise, train and change the network.

    Make one with `as_network` of `jdrop.linen` or `jdrop.nnx`, or with `Network(apply_fn)`. A
    network can be called like its `apply_fn`.

    Attributes:
        apply_fn: maps variables, inputs and a key or None to outputs. It changes no state: batch
            statistics stay the same, also when it draws masks.
        init_fn: maps a key and example inputs to variables.
        train_fn: maps variables, inputs and a key to outputs and updated variables, for instance
            with new batch statistics. Without it, training uses `apply_fn`.
        replace_fn: `replace_fn(f, attention_dropout)` implements `replace_dropout`.
        step_rule: replaces the ordinary training step; None for the ordinary step.
        choose_fn: chooses the outputs of `apply_fn` among those of `train_fn`.

    Example:
        >>> import jax, jax.numpy as jnp, jdrop
        >>> def apply_fn(variables, inputs, key):
        ...     x = inputs if key is None else jdrop.dropout(key, inputs, 0.2)
        ...     return x @ variables["params"]
        >>> network = Network(apply_fn)
        >>> network({"params": jnp.ones((3, 2))}, jnp.ones((1, 3)), None)
        Array([[3., 3.]], dtype=float32)
    """

    apply_fn: ApplyFn
    init_fn: Callable[[Array, Any], Variables] | None = None
    train_fn: Callable[[Variables, Any, Array], tuple[Any, Variables]] | None = None
    replace_fn: Callable[[ReplaceFn, AttentionDropout], "Network"] | None = None
    step_rule: StepRule | None = None
    choose_fn: Callable[[Any], Any] | None = None

    def __call__(self, variables: Variables, inputs: Any, key: Array | None) -> Any:
        """Returns the outputs of `apply_fn`."""
        return self.apply_fn(variables, inputs, key)

    def init(self, key: Array, inputs: Any) -> Variables:
        """Returns initial variables for inputs of this shape and dtype.

        Raises:
            ValueError: a network without an `init_fn`.
        """
        if self.init_fn is None:
            raise ValueError(
                "this network has no init_fn; give one, or make the variables yourself."
            )
        return self.init_fn(key, inputs)

    def apply_train(self, variables: Variables, inputs: Any, key: Array) -> tuple[Any, Variables]:
        """Returns the outputs in training, and the variables with their state updated.

        The variables keep their structure. What a pass adds to it is left out: a module that calls
        `sow` adds values at each pass, so that the state would grow from step to step.
        """
        if self.train_fn is None:
            return self.apply_fn(variables, inputs, key), variables
        outputs, updated = self.train_fn(variables, inputs, key)
        return outputs, _updated(variables, updated)

    def replace_dropout(
        self, f: ReplaceFn, *, attention_dropout: AttentionDropout = False
    ) -> "Network":
        """Returns the network with `f` called in place of every dropout layer.

        This holds for layers of jdrop and of Flax, and for every pass, with and without a key. The
        other layers then accept weights of fewer units than they were made for. The result has no
        `step_rule`, and nothing checks whether the mode reaches its layers. A second
        `replace_dropout` sees only the calls for which the first `f` returned None.

        Args:
            f: `f(site, inputs)` returns the outputs of the layer, or None: the layer does what it
                always does.
            attention_dropout: whether attention layers go on dropping weights. A function
                `g(site)` is called for each layer with a rate above 0; it returns the key with
                which the layer drops, or None: the layer drops nothing.

        Raises:
            ValueError: a network without a `replace_fn`.

        Example:
            >>> import flax.linen as nn, jax, jax.numpy as jnp, jdrop.linen
            >>> module = nn.Sequential([nn.Dense(2), nn.Dropout(0.5, deterministic=False)])
            >>> network = jdrop.linen.as_network(module)
            >>> ones = network.replace_dropout(lambda site, inputs: jnp.ones_like(inputs))
            >>> x = jnp.ones((1, 3))
            >>> ones(network.init(jax.random.key(0), x), x, None)
            Array([[1., 1.]], dtype=float32)
        """
        if self.replace_fn is None:
            raise ValueError(
                "this network has no replace_fn, so its dropout layers cannot be replaced; make "
                "it with `jdrop.linen.as_network` or `jdrop.nnx.as_network`, or give a replace_fn."
            )

        def replace_remaining(g: ReplaceFn, attention_dropout_too: AttentionDropout) -> Network:
            def f_then_g(site: DropoutSite, inputs: Array) -> Array | None:
                outputs = f(site, inputs)
                return g(site, inputs) if outputs is None else outputs

            both = attention_dropout and attention_dropout_too
            # A second `True` leaves the keys to the first choice.
            both = attention_dropout if attention_dropout_too is True else both
            return self.replace_dropout(f_then_g, attention_dropout=both)

        replaced = self.replace_fn(f, attention_dropout)
        return replace(replaced, replace_fn=replace_remaining, step_rule=None)


def _updated(before: Any, after: Any) -> Any:
    """The values of `after` in the structure of `before`; what has grown stays as it was."""
    if before is after:
        return before
    if isinstance(before, dict) and isinstance(after, dict):
        return {
            name: _updated(value, after[name]) if name in after else value
            for name, value in before.items()
        }
    structures: list[Any] = [jax.tree.structure(tree) for tree in (before, after)]
    return after if structures[0] == structures[1] else before


def dropout_sites(network: Network, variables: Any, inputs: Any) -> tuple[DropoutSite, ...]:
    """Lists the calls of dropout layers in a training pass, in their order.

    The pass is abstract: it computes nothing. A layer inside a loop such as `nn.scan` can be listed
    more than once, as JAX can trace the body of a loop more than once.

    Args:
        network: made by `as_network`.
        variables: of the network, or their shapes and dtypes.
        inputs: `[batch, ...]`, or their shape and dtype.

    Returns:
        The sites. The rate is NaN where the pass computes it.

    Raises:
        ValueError: a network without a `replace_fn`.

    Example:
        >>> import flax.linen as nn, jdrop.linen
        >>> module = nn.Sequential([nn.Dense(2), nn.Dropout(0.5, deterministic=False)])
        >>> network, x = jdrop.linen.as_network(module), jnp.ones((1, 3))
        >>> sites = dropout_sites(network, network.init(jax.random.key(0), x), x)
        >>> [(site.name, site.shape, site.rate) for site in sites]
        [('layers_1', (1, 2), 0.5)]
    """
    sites: list[DropoutSite] = []
    listing = network.replace_dropout(site_lister(sites), attention_dropout=True)
    jax.eval_shape(listing.apply_train, variables, inputs, jax.random.key(0))
    return tuple(sites)


def site_lister(sites: list[DropoutSite]) -> ReplaceFn:
    """A `ReplaceFn` that appends each site to the list, and leaves the layer as it is."""

    def list_site(site: DropoutSite, inputs: Array) -> None:
        rate = math.nan if isinstance(site.rate, jax.core.Tracer) else site.rate
        sites.append(replace(site, rate=rate, make_key=_no_key))

    return list_site


def _no_key() -> Array:
    raise RuntimeError("make_key can be called only during the pass, in a `ReplaceFn`.")


def consumed_keys(network: Network, variables: Any, inputs: Any) -> tuple[str, ...]:
    """Lists where a training pass makes random numbers of its key, on which the pass depends.

    If the list is empty, passes with different keys give equal outputs and equal variables. So it
    tells whether a network whose dropout layers are replaced still draws masks of its own. The pass
    is abstract: it computes nothing.

    Args:
        network: any network.
        variables: of the network, or their shapes and dtypes.
        inputs: arrays, or their shapes and dtypes.

    Returns:
        The place of each use: the path of the linen module, if there is one, and in brackets the
        file and line of the program.

    Example:
        >>> import flax.linen as nn, jdrop.linen
        >>> module = nn.Sequential([nn.Dense(2), nn.Dropout(0.5, deterministic=False)])
        >>> network, x = jdrop.linen.as_network(module), jnp.ones((1, 3))
        >>> variables = network.init(jax.random.key(0), x)
        >>> len(consumed_keys(network, variables, x))
        1
        >>> consumed_keys(network.replace_dropout(lambda site, inputs: inputs), variables, x)
        ()
    """
    traced = trace(network.apply_train, variables, inputs, jax.random.key(0))
    if not traced.depends(outputs=[0, 1], arguments=[2]):
        return ()
    return traced.consumptions(outputs=[0, 1], argument=2) or ("the pass",)


def record_masks(
    key: Array, network: Network, variables: Variables, inputs: Any
) -> tuple[Array, dict[str, tuple[Array | None, ...]]]:
    """Runs a network and returns its outputs together with the masks that it drew.

    For layers of jdrop the outputs equal `network(variables, inputs, key)`. A dropout layer of Flax
    draws its mask as jdrop's layer would, so its outputs differ from Flax's. So do the outputs of
    dropout in the branch of a `DropPath`, which is computed for all samples here. Masks of
    attention weights are not recorded.

    Args:
        key: consumed.
        network: made by `as_network`.
        variables: of one network.
        inputs: `[batch, ...]`.

    Returns:
        The outputs, and for each layer that dropped something, by its name, a tuple with the mask
        of each call: Boolean, True where kept, with size 1 along `broadcast_dims`. A call that was
        switched off, or had the rate 0, has None in place of its mask.

    Raises:
        ValueError: a network without a `replace_fn`; a dropout layer inside a transformation.

    Example:
        >>> import flax.linen as nn, jdrop.linen
        >>> module = nn.Sequential([nn.Dense(8), jdrop.linen.Dropout(0.5, deterministic=False)])
        >>> network, x = jdrop.linen.as_network(module), jnp.ones((1, 3))
        >>> variables = network.init(jax.random.key(0), x)
        >>> outputs, masks = record_masks(jax.random.key(1), network, variables, x)
        >>> bool(jnp.all(masks["layers_1"][0] == (outputs != 0)))
        True
        >>> bool(jnp.all(replay_masks(network, masks)(variables, x, None) == outputs))
        True
    """

    def draw(site: DropoutSite, inputs: Array) -> tuple[Array | None, Array | None]:
        rate = functional.check_rate(site.rate, allow_one=True)
        if site.deterministic or functional.is_number(rate, 0):
            return None, None
        shape = functional.mask_shape(inputs.shape, site.broadcast_dims)
        if functional.is_number(rate, 1):
            # The layer draws nothing here, so the key stays unused.
            mask = jnp.zeros(shape, bool)
        elif site.fixed_count and isinstance(rate, float):
            mask = stochastic_depth.draw_fixed_count_mask(site.make_key(), shape, rate)
        else:
            mask = functional.draw_mask(site.make_key(), shape, rate, like=inputs)
        return _apply_mask(mask, inputs, rate), mask

    outputs, values, unreadable = read_sites(key, draw, network, variables, inputs)
    if unreadable:
        raise ValueError(
            f"the masks of {', '.join(unreadable)} cannot be recorded, because the layer is inside "
            "a transformation such as `nn.scan`, `nn.remat` or `nnx.jit`; record a network without "
            "the transformation."
        )
    masks: defaultdict[str, tuple[Array | None, ...]] = defaultdict(tuple)
    for (name, _), mask in values.items():
        masks[name] += (mask,)
    return outputs, {
        name: calls for name, calls in masks.items() if any(mask is not None for mask in calls)
    }


def replay_masks(network: Network, masks: Mapping[str, Sequence[Array | None]]) -> Network:
    """Returns the network whose dropout layers apply these masks in every pass.

    A layer with masks draws nothing, so the network needs no key for it. Layers without masks and
    attention layers draw as before: with a key at random, without one not at all.

    Args:
        network: made by `as_network`.
        masks: for each layer to replay, by its name, a tuple with the mask of each call, as
            `record_masks` returns it. A mask is Boolean, True where kept, and broadcastable to the
            layer's inputs; None leaves the call as it is. After the last mask the first one
            follows, so `(mask,)` serves every call. Inside a loop such as `nn.scan`, all
            iterations share the masks.

    Raises:
        TypeError: masks of a layer that are not in a tuple or list.
        ValueError: a network without a `replace_fn`; an empty tuple of masks; in a pass: a name
            that is no dropout layer, a mask that does not fit.
    """
    for name, calls in masks.items():
        if not isinstance(calls, tuple | list):
            raise TypeError(
                f"masks[{name!r}] must be a tuple with a mask for each call of the layer, got "
                f"{type(calls).__name__}; for one mask at every call give `(mask,)`."
            )
        if not calls:
            raise ValueError(
                f"masks[{name!r}] must hold at least 1 mask, got none; leave the layer out."
            )
    masks = dict(masks)
    visited: set[str] = set()

    def replay(site: DropoutSite, inputs: Array) -> Array | None:
        visited.add(site.name)
        if site.name not in masks:
            return None
        mask = masks[site.name][site.index % len(masks[site.name])]
        return None if mask is None else _apply_mask(mask, inputs, site.rate)

    replayed = network.replace_dropout(replay, attention_dropout=True)

    def check_names() -> None:
        unknown = [name for name in masks if name not in visited]
        if unknown:
            raise ValueError(
                f"masks names {', '.join(unknown)}, but the network has no such dropout layer, or "
                "its layer is replaced already; it has "
                f"{', '.join(sorted(visited)) or 'none'}."
            )

    def apply_fn(variables: Variables, inputs: Any, key: Array | None) -> Any:
        outputs = replayed(variables, inputs, key)
        check_names()
        return outputs

    def train_fn(variables: Variables, inputs: Any, key: Array) -> tuple[Any, Variables]:
        outputs, variables = replayed.apply_train(variables, inputs, key)
        check_names()
        return outputs, variables

    # Initialisation may see a batch of another size than the masks.
    return replace(replayed, apply_fn=apply_fn, train_fn=train_fn, init_fn=network.init_fn)


def _apply_mask(mask: Array, inputs: Array, rate: ArrayLike) -> Array:
    """`apply_mask` for layers, which allow the rate 1."""
    if functional.is_number(functional.check_rate(rate, allow_one=True), 1):
        return jnp.zeros_like(inputs)
    return functional.apply_mask(mask, inputs, rate)


def read_sites(
    key: Array | None,
    f: Callable[[DropoutSite, Array], tuple[Array | None, Any]],
    network: Network,
    variables: Variables,
    inputs: Any,
) -> tuple[Any, dict[tuple[str, int], Any], list[str]]:
    """Runs a network and collects a value at each call of a dropout layer.

    Args:
        key: consumed. Without a key attention layers drop nothing.
        f: `f(site, inputs)` returns the outputs of the layer, or None for its own, and the value.
        network: made by `as_network`.
        variables: of one network.
        inputs: `[batch, ...]`.

    Returns:
        The outputs; the values by name and index of the call, in the order of the calls; the names
        of layers inside a transformation such as `nn.scan`, whose values cannot leave it.

    Example:
        >>> import flax.linen as nn, jdrop.linen
        >>> network = jdrop.linen.as_network(nn.Dropout(0.5))
        >>> def read_inputs(site, inputs):
        ...     return inputs, inputs
        >>> read_sites(None, read_inputs, network, {}, jnp.ones(2))[1]
        {('', 0): Array([1., 1.], dtype=float32)}
    """
    values: dict[tuple[str, int], Any] = {}
    unreadable: list[str] = []
    outside = get_opaque_trace_state(convention="flax")

    def read(site: DropoutSite, inputs: Array) -> Array | None:
        outputs, value = f(site, inputs)
        if get_opaque_trace_state(convention="flax") == outside:
            values[site.name, site.index] = value
        elif site.name not in unreadable:
            unreadable.append(site.name)
        return outputs

    reading = network.replace_dropout(read, attention_dropout=key is not None)
    return reading(variables, inputs, key), values, unreadable


def predict(
    key: Array | None,
    network: ApplyFn,
    variables: Variables,
    inputs: Any,
    *,
    regression: bool = False,
) -> Array:
    """Predicts with ONE network: log-probabilities of the classes, or the outputs of a regression.

    Args:
        key: consumed; the network draws masks from it. None: the deterministic network.
        network: an `apply_fn`; it returns logits `[batch, class]`, or with `regression` anything.
        variables: of one network.
        inputs: `[batch, ...]`, or any pytree of such arrays.
        regression: whether to return the outputs as they are.

    Returns:
        Normalised log-probabilities `[batch, class]`, at least float32: 16 bits are enough for
        logits, but too few for averages. With `regression` the outputs.

    Raises:
        TypeError: a module in place of a network; outputs that are not one array.
        ValueError: outputs without a class axis or of a single class, unless `regression`.

    Example:
        >>> network = Network(lambda variables, inputs, key: inputs @ variables["params"])
        >>> predict(None, network, {"params": jnp.ones((3, 2))}, jnp.ones((1, 3))).round(2)
        Array([[-0.69, -0.69]], dtype=float32)
    """
    check_network(network)
    outputs = network(variables, inputs, key)
    if not hasattr(outputs, "ndim"):
        raise TypeError(
            "the network must return one array to predict, got "
            f"{type(outputs).__name__} with the arrays {jax.tree.map(jnp.shape, outputs)}; choose "
            "the logits with `as_network(..., outputs=...)`."
        )
    if regression:
        return outputs
    if outputs.ndim < 2 or outputs.shape[-1] == 1:
        raise ValueError(
            "the network must return logits [batch, class] of at least 2 classes, got outputs of "
            f"shape {outputs.shape}; give `regression=True` for outputs that are no logits, or "
            "inputs with a batch axis."
        )
    return jax.nn.log_softmax(outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32)))


def check_network(network: Any) -> None:
    """Raises TypeError if `network` is a Flax module, a class, or cannot be called."""
    is_module = any(base.__module__.startswith("flax.") for base in type(network).__mro__)
    if is_module or isinstance(network, type) or not callable(network):
        raise TypeError(
            f"network must be a function apply_fn(variables, inputs, key), got {network!r}; make "
            "one with `jdrop.linen.as_network` or `jdrop.nnx.as_network`."
        )
