"""What the networks of an nnx module are made with, see `jdrop.nnx.as_network`."""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jdrop import stochastic_depth
from jdrop.attention_sites import with_site
from jdrop.calls import MODE_FLAGS, mode_attributes
from jdrop.network import AttentionDropout, DropoutSite, ReplaceFn


def make_key(layer: nnx.Dropout, rngs: nnx.Rngs | nnx.RngStream | Array | None) -> Array:
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


def stream_tags(model: nnx.Module) -> list[str]:
    """The names of the rng streams inside a model."""
    nodes = [node for _, node in nnx.iter_graph(model)]
    return sorted({node.tag for node in nodes if isinstance(node, nnx.RngStream)})


def set_mode(model: nnx.Module, *, train: bool, updating: bool) -> None:
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


def filled(abstract: Any, values: dict[str, Any]) -> Any:
    """The abstract state with values, given as nested dictionaries, in place of shapes."""
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, values)
    return state


def unseeded(leaf: jax.ShapeDtypeStruct) -> Array:
    """A value for rng state until the streams are reseeded."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def intercept(
    model: nnx.Module,
    replace: ReplaceFn | None,
    attention_dropout: AttentionDropout,
    *,
    running_averages: bool,
) -> None:
    """Changes what the layers of a model do when they are called, for ONE pass.

    Args:
        model: changed in place.
        replace: called in place of dropout layers.
        attention_dropout: whether attention layers drop weights, or what chooses their keys.
        running_averages: whether batch normalisation uses its running averages, whatever its call
            says.
    """
    num_calls: Counter[str] = Counter()
    for path, layer in list(nnx.iter_modules(model)):
        name = "/".join(map(str, path))
        if isinstance(layer, nnx.Dropout) and replace is not None:
            _set_call(layer, partial(_call_dropout, replace, name, num_calls))
        elif isinstance(layer, nnx.MultiHeadAttention) and not attention_dropout:
            object.__setattr__(layer, "dropout_rate", 0.0)
        elif isinstance(layer, nnx.MultiHeadAttention) and callable(attention_dropout):
            choose_key = partial(
                _key_of_attention, attention_dropout, name, num_calls, layer_class=type(layer)
            )
            object.__setattr__(layer, "attention_fn", with_site(layer.attention_fn, choose_key))
        elif type(layer) is nnx.BatchNorm and running_averages:
            _set_call(layer, _call_with_running_averages)


def _key_of_attention(
    choose: Callable[[DropoutSite], Array | None],
    name: str,
    num_calls: Counter[str],
    **properties: Any,
) -> Array | None:
    """The key that `choose` returns for a call of an attention layer."""
    index = num_calls[name]
    num_calls[name] += 1
    return choose(DropoutSite(name=name, index=index, **properties))


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

    # The class stays recognisable: the name of its module says whose layer it is.
    members = {"__call__": call, "__module__": layer_class.__module__}
    return type(f"Replaced{layer_class.__name__}", (layer_class,), members)


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
    if given.get("branch") is not None:
        inputs = given["branch"](inputs)
        given["branch"] = stochastic_depth.return_computed
    site = DropoutSite(
        name=name,
        index=index,
        shape=inputs.shape,
        rate=layer.rate if rate is None else rate,
        broadcast_dims=_broadcast_dims(layer, inputs),
        deterministic=layer.deterministic if deterministic is None else deterministic,
        make_key=partial(make_key, layer, given.get("rngs")),
        fixed_count=given.get("branch") is not None,
        layer_class=type(layer),
    )
    outputs = replace(site, inputs)
    return own_call(inputs, **given) if outputs is None else outputs


def _broadcast_dims(layer: nnx.Dropout, inputs: Array) -> tuple[int, ...]:
    # The layers are in a room above. Only a `DropPath` has this attribute.
    per_sample = getattr(layer, "per_sample", None)
    if per_sample is None:
        return tuple(layer.broadcast_dims)
    return stochastic_depth.shared_dims(inputs.ndim, per_sample)


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
