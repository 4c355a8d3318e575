"""Puts other layers in place of Flax's in every pass of a linen module, see `jdrop.linen.swap`.

The module becomes an instance of a subclass of its class. Its methods run with an interceptor,
which changes the class and the attributes of a layer while the layer is called.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import flax.linen as nn
from flax.core import Scope, freeze

from jdrop import attention
from jdrop.swapping import Swap

_FLAG = "jdrop swap"
"""The flag of a scope that holds the swap. `nn.jit` caches by flags, so by swaps too."""

_DONE = "_jdrop_swapped"
"""The attribute of a layer whose call is running with the changes."""


@dataclass(frozen=True, eq=False)
class LinenSwap(Swap):
    """A swap, and the layers to put in place.

    Attributes:
        layers: for each class of Flax, what takes its place.
        dropout: the class of layers that are added.
        visited: the paths of all layers that were called in any pass.
    """

    layers: Mapping[type, type]
    dropout: Callable[..., Any]
    visited: set[str] = field(default_factory=set)


def swapped_module(module: nn.Module, swap: LinenSwap) -> nn.Module:
    """Returns the module with other layers in place of Flax's, in every pass."""
    base: Any = swap.layers.get(type(module), type(module))
    methods = {
        name: _with_swap(method, swap)
        for name in dir(base)
        if name == "__call__" or not (name.startswith("_") or hasattr(nn.Module, name))
        if hasattr(method := getattr(base, name), "method_handler_wrapped")
    }

    def post_init(self: Any) -> None:
        """Binds the module, with the swap among the flags of its scope and all scopes inside."""
        is_outermost = isinstance(self.parent, Scope)
        scope = self.parent if is_outermost else getattr(self.parent, "scope", None)
        if scope is None:
            return base.__post_init__(self)
        before = scope.flags
        scope.flags = freeze({**before, _FLAG: swap})
        try:
            base.__post_init__(self)
        finally:
            if not is_outermost:
                scope.flags = before

    members = {
        **methods,
        "__post_init__": post_init,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    # Layers are named after classes, so the name of the class stays.
    swapped_class = type(base.__name__, (base,), members)
    attributes = {
        f.name: getattr(module, f.name) for f in fields(module) if f.init and f.name != "parent"
    }
    return swapped_class(**attributes)


def _with_swap(method: Callable[..., Any], swap: LinenSwap) -> Callable[..., Any]:
    """The method of a module, whose layers are swapped."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_intercept):
            outputs = method(self, *args, **kwargs)
        swap.check_names(swap.visited)
        return outputs

    return call


def _intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    if context.method_name == "__call__" and is_pending(context.module):
        return call_swapped(context.module, call, args, kwargs)
    return call(*args, **kwargs)


def is_pending(layer: nn.Module) -> bool:
    """Whether a swap changes the layer, and its call is not running with the changes yet.

    An interceptor that reads or replaces layers asks this first, and calls `call_swapped` if so.
    """
    scope = layer.scope
    return scope is not None and _FLAG in scope.flags and not getattr(layer, _DONE, False)


def call_swapped(layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a layer with the changes of the swap.

    Args:
        layer: the layer.
        call: its own call.
        args: of the call.
        kwargs: of the call.
    """
    swap, name = layer.scope.flags[_FLAG], "/".join(layer.path)
    swap.visited.add(name)
    changed = _changes(swap, layer, name)
    if changed:
        # With its new class, the layer has another call, and interceptors see it as it is then.
        call = layer
    outputs = call_with_attributes(layer, {**changed, _DONE: True}, call, args, kwargs)
    if name not in swap.after:
        return outputs
    is_off = layer.is_initializing() or not layer.has_rng("dropout")
    added = swap.dropout(swap.after[name], parent=layer.scope.push("added_dropout", reuse=True))
    object.__setattr__(added, _DONE, True)
    return added(outputs, deterministic=is_off)


def _changes(swap: LinenSwap, layer: Any, name: str) -> dict[str, Any]:
    """The attributes of a layer that the swap changes, with their values."""
    changed: dict[str, Any] = {}
    new_class = swap.layers.get(type(layer))
    if isinstance(layer, nn.Dropout):
        changed["rate"] = swap.new_rate(name, layer.rate)
    elif isinstance(layer, nn.MultiHeadDotProductAttention):
        rate = swap.new_rate(name, layer.dropout_rate, is_attention=True)
        changed["dropout_rate"] = rate
        if layer.attention_fn is nn.dot_product_attention:
            changed["attention_fn"] = attention.for_flax
        else:
            new_class = None
    if new_class is not None:
        changed["__class__"] = new_class
    return changed


def call_with_attributes(
    layer: nn.Module, changed: dict[str, Any], call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Calls a method while attributes of its frozen module have other values."""
    before = {name: getattr(layer, name, None) for name in changed}
    try:
        for name, value in changed.items():
            object.__setattr__(layer, name, value)
        return call(*args, **kwargs)
    finally:
        for name, value in before.items():
            object.__setattr__(layer, name, value)
