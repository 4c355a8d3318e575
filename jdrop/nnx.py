"""Dropout for Flax nnx, and the adapter that makes an nnx module a `Network`.

Replace `flax.nnx.Dropout` by `jdrop.nnx.Dropout` and the rest of a project stays as it is.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jdrop import attention, functional
from jdrop.calls import (
    MODE_FLAGS,
    CallFn,
    ModeCheck,
    bind_call,
    mode_attributes,
    output_chooser,
)
from jdrop.network import DropoutSite, Network, ReplaceFn, Variables, site_lister

__all__ = ["Dropout", "MultiHeadAttention", "as_network"]


class Dropout(nnx.Module):
    """Drops each element of its inputs with probability `rate`; see `jdrop.dropout`.

    The constructor and the call take the arguments of `flax.nnx.Dropout`, with the same meaning.
    In addition the call takes a rate, which may be traced.

    Args:
        rate: the probability to drop, in [0, 1]; at 1 the output is zeros.
        broadcast_dims: the axes along which elements share one decision.
        deterministic: whether to return the inputs unchanged; the call's value takes precedence.
        rng_collection: the name of the rng stream that makes the keys.
        rngs: the source of keys; the layer forks it and keeps its own stream.

    Raises:
        ValueError: a rate out of range; no `deterministic` or no `rngs` in either place.
        TypeError: `rngs` of another type.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jdrop.nnx
        >>> layer = jdrop.nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.ones((2, 3)))
        >>> bool(jnp.all((y == 0) | (y == 2)))
        True
    """

    def __init__(
        self,
        rate: float | int,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        functional.check_rate(rate, allow_one=True)
        self.rate = rate
        self.broadcast_dims = broadcast_dims
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        if isinstance(rngs, nnx.Rngs):
            self.rngs = rngs[rng_collection].fork()
        elif isinstance(rngs, nnx.RngStream):
            self.rngs = rngs.fork()
        elif rngs is None:
            self.rngs = nnx.data(None)
        else:
            raise TypeError(f"rngs must be a Rngs, a RngStream or None, got {type(rngs).__name__}.")

    def __call__(
        self,
        inputs: Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        rate: ArrayLike | None = None,
    ) -> Array:
        """Applies dropout, or returns the inputs unchanged.

        Args:
            inputs: float or complex, any shape.
            deterministic: takes precedence over the constructor's.
            rngs: a key or a source of keys; takes precedence over the constructor's.
            rate: instead of the constructor's; may be traced, a scalar or broadcastable to
                `inputs`.
        """
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            raise ValueError(
                "deterministic was given nowhere; pass it to the constructor, "
                "`Dropout(..., deterministic=True)`, to the call, `dropout(x, deterministic=True)`,"
                " or to a view of the model, `nnx.view(model, deterministic=True)`."
            )
        rate = functional.check_rate(self.rate if rate is None else rate, allow_one=True)
        if deterministic or functional.is_number(rate, 0):
            return inputs
        if functional.is_number(rate, 1):
            return jnp.zeros_like(inputs)
        key = _make_key(self, rngs)
        return functional.dropout(key, inputs, rate, broadcast_dims=self.broadcast_dims)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode; `nnx.view` calls this method.

        Args:
            deterministic: whether to return the inputs unchanged.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def _make_key(layer: Dropout | nnx.Dropout, rngs: nnx.Rngs | nnx.RngStream | Array | None) -> Array:
    """The key for the layer's next mask, from `rngs` or else from the layer's own stream."""
    if rngs is None:
        rngs = layer.rngs
    if rngs is None:
        raise ValueError(
            "rngs was given nowhere, and deterministic is False; pass it to the constructor, "
            "`Dropout(..., rngs=nnx.Rngs(0))`, or to the call, `dropout(x, rngs=key)`."
        )
    if isinstance(rngs, nnx.Rngs):
        return rngs[layer.rng_collection]()
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    if isinstance(rngs, jax.Array):
        return rngs
    raise TypeError(f"rngs must be a Rngs, a RngStream or a key, got {type(rngs).__name__}.")


class MultiHeadAttention(nnx.MultiHeadAttention):
    """Flax's layer, with the attention of `jdrop.dot_product_attention`.

    Arguments, parameters and calls are those of `flax.nnx.MultiHeadAttention`. Only blocks of the
    attention weights are in memory; Flax holds all of them, and keeps them and their masks for the
    backward pass. Each example and head has its own mask; in Flax they share one unless
    `broadcast_dropout=False`.

    Raises:
        ValueError: a rate out of [0, 1); `sow_weights=True` at the call.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jdrop.nnx
        >>> layer = jdrop.nnx.MultiHeadAttention(
        ...     num_heads=2, in_features=8, dropout_rate=0.1, decode=False, rngs=nnx.Rngs(0)
        ... )
        >>> layer(jnp.ones((3, 10, 8)), deterministic=False).shape
        (3, 10, 8)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *args: Any,
        broadcast_dropout: bool = False,
        attention_fn: Callable[..., Array] = attention.for_flax,
        dropout_rate: float | int = 0.0,
        **kwargs: Any,
    ) -> None:
        functional.check_rate(dropout_rate, name="dropout_rate")
        super().__init__(
            num_heads,
            in_features,
            *args,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
            attention_fn=attention_fn,
            **kwargs,
        )


def as_network(
    make_module: Any,
    call: CallFn | None = None,
    *,
    outputs: Callable[[Any], Any] | str | int | None = None,
    has_dropout: bool = True,
) -> Network:
    """Makes a `jdrop.network.Network` from an nnx module.

    The variables are `params` (the `nnx.Param`s of the module) and `state` (the rest except rngs,
    for instance batch statistics); each is nested dictionaries of arrays. Training updates `state`.
    A pass that draws masks outside training uses the running averages of batch normalisation. The
    names of the dropout sites are the paths of the layers, for instance "block/dropout".

    The module's call gets the mode, if it has one, by arguments named `deterministic`, `train`,
    `training`, `is_training` or `enable_dropout`. So do attributes with these names, of all modules
    inside and of a dataclass among their attributes. As in Flax, the attributes `deterministic` and
    `use_running_average` set the modes of the layers. An argument `rngs`, `key` or `rng` of the
    call gets the key. A dictionary whose keys are names of arguments gives inputs by name. A tuple
    gives them by position, if the call takes several. Other inputs are the first argument.

    Training is traced once, by `init` or at the first pass. If it draws no mask, or leaves all
    batch statistics as they are, an error shows the `call` to write. So does a prediction that
    draws masks, or uses the statistics of its batch.

    Args:
        make_module: makes the module from an argument named `rngs`: its class, or a function.
        call: `call(module, inputs, *, train, key)` returns the outputs. In prediction `train` is
            False and `key` None.
        outputs: what predictions are made of, among the outputs of the call: a function of them, a
            key or an index. By default all of them. A loss sees all of them.
        has_dropout: whether training must draw masks.

    Raises:
        TypeError: a module in place of the function that makes it.
        ValueError: a call with another argument whose default is True or False; at the first use, a
            module that its mode does not reach.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.linear, self.dropout = nnx.Linear(3, 2, rngs=rngs), nnx.Dropout(0.5)
        ...     def __call__(self, x, rngs=None):
        ...         return self.linear(self.dropout(x, rngs=rngs))
        >>> network = as_network(Net)
        >>> variables = network.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> network(variables, jnp.ones((4, 3)), None).shape
        (4, 2)
    """
    if isinstance(make_module, nnx.Module) or not callable(make_module):
        raise TypeError(
            f"make_module must be a function of rngs that makes the module, got "
            f"{type(make_module).__name__}; give the class, or `lambda rngs: MyModule(rngs=rngs)`."
        )
    abstract_model = nnx.eval_shape(lambda: make_module(rngs=nnx.Rngs(0)))
    bound = bind_call(type(abstract_model), nnx.Rngs) if call is None else call
    choose, check = output_chooser(outputs), ModeCheck(bound, has_dropout)
    graphdef, *states = nnx.split(abstract_model, nnx.Param, nnx.RngState, ...)
    abstract_params, abstract_rngs, abstract_state = states

    def merge(variables: Variables, key: Array | None, *, train: bool, updating: bool) -> Any:
        model = nnx.merge(
            graphdef,
            _filled(abstract_params, variables["params"]),
            jax.tree.map(_unseeded, abstract_rngs),
            _filled(abstract_state, variables["state"]),
        )
        _set_mode(model, train=train, updating=updating)
        if key is not None:
            tags = _stream_tags(model)
            keys = dict(zip(tags, jax.random.split(key, len(tags)), strict=True))
            nnx.reseed(model, policy="match_shape", **keys)
        return model

    def run(model: nnx.Module, inputs: Any, key: Array | None) -> Any:
        """The outputs of a pass; it draws masks if it has a key."""
        if key is None:
            return bound(model, inputs, train=False, key=None)
        # Not a further child, so that masks do not depend on whether the call takes a key.
        num_streams = len(_stream_tags(model))
        call_key = jax.random.fold_in(key, num_streams) if check.needs_key else None
        return bound(model, inputs, train=True, key=call_key)

    def state_after(model: nnx.Module) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(model, nnx.Param, nnx.RngState, ...)[-1])

    def batch_stats(variables: Variables) -> list[Any]:
        state = _filled(abstract_state, variables["state"])
        return jax.tree.leaves(nnx.filter_state(state, nnx.BatchStat))

    def check_training(variables: Variables, inputs: Any, key: Array) -> None:
        if not check.is_done("training"):
            check.training(network(None, True), batch_stats, variables, inputs, key)

    def check_prediction(variables: Variables, inputs: Any) -> None:
        def run_listing(variables: Variables, inputs: Any, key: Array, sites: Any) -> Any:
            model = merge(variables, key, train=False, updating=False)
            _intercept(model, site_lister(sites), True, running_averages=True)
            return run(model, inputs, None), batch_stats({"state": state_after(model)})

        if not check.is_done("prediction"):
            check.prediction(run_listing, variables, inputs, jax.random.key(0))

    def network(replace: ReplaceFn | None, attention_dropout: bool) -> Network:
        """The network with `replace` called in place of its dropout layers."""

        def init(key: Array, inputs: Any) -> Variables:
            model = make_module(rngs=nnx.Rngs(key))
            params, _, state = nnx.state(model, nnx.Param, nnx.RngState, ...)
            variables = {"params": nnx.to_pure_dict(params), "state": nnx.to_pure_dict(state)}
            check_training(variables, inputs, key)
            return variables

        def apply(variables: Variables, inputs: Any, key: Array | None) -> Any:
            if replace is None:
                if key is None:
                    check_prediction(variables, inputs)
                else:
                    check_training(variables, inputs, key)
            model = merge(variables, key, train=key is not None, updating=False)
            _intercept(model, replace, attention_dropout, running_averages=True)
            return choose(run(model, inputs, key))

        def apply_train(variables: Variables, inputs: Any, key: Array) -> tuple[Any, Variables]:
            if replace is None:
                check_training(variables, inputs, key)
            model = merge(variables, key, train=True, updating=True)
            _intercept(model, replace, attention_dropout, running_averages=False)
            outputs = run(model, inputs, key)
            return outputs, {**variables, "state": state_after(model)}

        return Network(apply, init, apply_train, network)

    return network(None, True)


def _stream_tags(model: nnx.Module) -> list[str]:
    """The names of the rng streams inside a model."""
    nodes = [node for _, node in nnx.iter_graph(model)]
    return sorted({node.tag for node in nodes if isinstance(node, nnx.RngStream)})


def _set_mode(model: nnx.Module, *, train: bool, updating: bool) -> None:
    """Sets the attributes, of a model and of all modules inside, that are modes.

    Args:
        model: changed in place.
        train: whether masks are drawn.
        updating: whether batch normalisation uses and updates the statistics of the batch.
    """
    set_by_flax = {"deterministic": not train, "use_running_average": not updating}
    model.set_attributes(raise_if_not_found=False, **set_by_flax)
    for _, module in list(nnx.iter_modules(model)):
        # A method may have the name of a mode: `nnx.Module.train` has.
        attributes = dict(vars(module))
        for name in MODE_FLAGS:
            if isinstance(member := getattr(type(module), name, None), property) and member.fset:
                attributes[name] = None
        others = {name: value for name, value in attributes.items() if name not in set_by_flax}
        for name, value in mode_attributes(others, train=train).items():
            setattr(module, name, value)


def _filled(abstract: Any, values: dict[str, Any]) -> Any:
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, values)
    return state


def _unseeded(leaf: jax.ShapeDtypeStruct) -> Array:
    """A value for rng state until the streams are reseeded."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _intercept(
    model: nnx.Module,
    replace: ReplaceFn | None,
    attention_dropout: bool,
    *,
    running_averages: bool,
) -> None:
    """Changes what the layers of a model do when they are called, for ONE pass.

    Args:
        model: changed in place.
        replace: called in place of dropout layers.
        attention_dropout: whether attention layers drop weights.
        running_averages: whether batch normalisation uses its running averages, whatever its call
            says.
    """
    num_calls: Counter[str] = Counter()
    for path, layer in list(nnx.iter_modules(model)):
        if isinstance(layer, Dropout | nnx.Dropout) and replace is not None:
            name = "/".join(map(str, path))
            _set_call(layer, partial(_call_dropout, replace, name, num_calls))
        elif isinstance(layer, nnx.MultiHeadAttention) and not attention_dropout:
            object.__setattr__(layer, "dropout_rate", 0.0)
        elif type(layer) is nnx.BatchNorm and running_averages:
            _set_call(layer, _call_with_running_averages)


def _set_call(layer: nnx.Module, call: Callable[..., Any]) -> None:
    """Makes a layer do `call(layer, its own call, *args, **kwargs)` when it is called."""
    object.__setattr__(layer, "replaced_call", call)
    object.__setattr__(layer, "__class__", _with_replaced_call(type(layer)))


@cache
def _with_replaced_call(layer_class: type) -> type:
    """A subclass whose instances do their `replaced_call` when they are called.

    Cached so that equal layers share one class; otherwise compiled functions would be retraced.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        own_call = partial(layer_class.__call__, self)
        return self.replaced_call(self, own_call, *args, **kwargs)

    return type(f"Replaced{layer_class.__name__}", (layer_class,), {"__call__": call})


def _call_dropout(
    replace: ReplaceFn,
    name: str,
    num_calls: Counter[str],
    layer: Any,
    own_call: Callable[..., Array],
    inputs: Array,
    **given: Any,
) -> Array:
    """Calls `replace` in place of a dropout layer, and the layer if `replace` returns None."""
    index = num_calls[name]
    num_calls[name] += 1
    deterministic, rate = given.get("deterministic"), given.get("rate")
    site = DropoutSite(
        name=name,
        index=index,
        shape=inputs.shape,
        rate=layer.rate if rate is None else rate,
        broadcast_dims=tuple(layer.broadcast_dims),
        deterministic=layer.deterministic if deterministic is None else deterministic,
        make_key=partial(_make_key, layer, given.get("rngs")),
    )
    outputs = replace(site, inputs)
    return own_call(inputs, **given) if outputs is None else outputs


def _call_with_running_averages(
    layer: nnx.BatchNorm,
    own_call: Callable[..., Array],
    x: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
) -> Array:
    """Calls batch normalisation with its running averages, whatever the call says."""
    return own_call(x, use_running_average=True, mask=mask)
