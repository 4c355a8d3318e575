"""Puts other layers in place of Flax's in an nnx model, see `jdrop.nnx.swap`."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from flax import nnx
from flax.nnx.nn.attention import dot_product_attention

from jdrop import attention
from jdrop.swapping import Swap


def swap_layers(
    model: nnx.Module,
    swap: Swap,
    layers: Mapping[Any, Any],
    make_dropout: Callable[[float], nnx.Module],
) -> None:
    """Changes the layers of a model in place.

    Args:
        model: the model.
        swap: what happens to its layers.
        layers: for each class of Flax, what takes its place.
        make_dropout: makes a dropout layer from its rate.
    """
    found = [("/".join(map(str, path)), layer) for path, layer in nnx.iter_modules(model)]
    swap.check_names(name for name, _ in found)
    # All rates are chosen before a layer changes, so that an error leaves the model as it was.
    changes = [(layer, _changes(swap, layers, name, layer)) for name, layer in found]
    for layer, changed in changes:
        for name, value in changed.items():
            object.__setattr__(layer, name, value)
    for name, layer in found:
        if name in swap.after:
            layer.added_dropout = make_dropout(swap.after[name])  # type: ignore[attr-defined]
            object.__setattr__(layer, "__class__", _with_dropout_after(type(layer)))


def _changes(swap: Swap, layers: Mapping[Any, Any], name: str, layer: Any) -> dict[str, Any]:
    """The attributes of a layer that the swap changes, with their values."""
    changed: dict[str, Any] = {}
    new_class = layers.get(type(layer))
    if isinstance(layer, nnx.Dropout):
        changed["rate"] = swap.new_rate(name, layer.rate)
    elif isinstance(layer, nnx.MultiHeadAttention):
        rate = swap.new_rate(name, layer.dropout_rate, is_attention=True)
        changed["dropout_rate"] = rate
        if layer.attention_fn is dot_product_attention:
            changed["attention_fn"] = attention.for_flax
        else:
            new_class = None
    if new_class is not None:
        changed["__class__"] = new_class
    return changed


@cache
def _with_dropout_after(layer_class: type) -> type:
    """A subclass whose instances drop elements of their outputs, by their `added_dropout`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.added_dropout(layer_class.__call__(self, *args, **kwargs))

    members = {
        "__call__": call,
        "__module__": layer_class.__module__,
        "__doc__": layer_class.__doc__,
    }
    return type(layer_class.__name__, (layer_class,), members)
