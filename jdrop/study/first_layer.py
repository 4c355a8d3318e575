"""The weights of a network's first layer as tiles, which a figure shows as images.

The first layer is the first matrix product or convolution that reads the inputs. It is found in the
operations of the network, not by its name: a name does not say what a layer reads.
"""

import math
from typing import Any

import jax
import numpy as np
from jax import Array

from jdrop.network import Network, Variables
from jdrop.thinned.jaxpr import Operation, flatten_jaxpr

MIN_SIDE = 8
"""Fewer than 8 x 8 flat inputs are rather the columns of a table than the pixels of an image."""

ELEMENTWISE = frozenset(
    ("add", "sub", "mul", "div", "max", "min", "neg", "copy", "convert_element_type", "name")
)
"""Primitives that change each pixel by itself, such as a standardisation."""

RESHAPES = frozenset(("reshape", "squeeze", "expand_dims", "broadcast_in_dim"))
"""Primitives that keep the order of the pixels, if they keep their count."""


def first_layer_tiles(network: Network, variables: Variables, inputs: Any) -> np.ndarray | None:
    """The weights of the first layer as square tiles, `[tile, side * side]`.

    A tile holds the weights of one unit for all pixels, in the order of the inputs. For a
    convolution it holds one channel of a filter; the channels of a filter are neighbours.

    Args:
        network: made by `as_network`.
        variables: of one network.
        inputs: `[example, ...]`, or a pytree of such arrays.

    Returns:
        None where the weights are no images: several inputs; a first layer of another kind, such
        as an embedding; one that reads part of an example, or pixels in another order; weights that
        are computed from parameters; filters of one pixel; tiles that are not square; a table of
        inputs.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, jdrop.linen
        >>> network = jdrop.linen.as_network(nn.Conv(5, (3, 3)), has_dropout=False)
        >>> inputs = jnp.ones((1, 8, 8, 2))
        >>> variables = network.init(jax.random.key(0), inputs)
        >>> first_layer_tiles(network, variables, inputs).shape
        (10, 9)
    """
    if not isinstance(inputs, Array):
        return None
    leaves, tree = jax.tree.flatten(variables)
    num_pixels = inputs.size // len(inputs)
    is_table = inputs.ndim == 2 and num_pixels < MIN_SIDE**2

    without_dropout = network.replace_dropout(lambda site, units: units)

    def read(leaves: list[Array], inputs: Array) -> tuple[Array, list[Array]]:
        return without_dropout(jax.tree.unflatten(tree, leaves), inputs, None), leaves

    program = flatten_jaxpr(jax.make_jaxpr(read)(leaves, inputs), len(leaves))
    weights = dict(zip(program.leaves, leaves, strict=True))
    pixels, ordered = set(program.inputs), set(program.inputs)
    for operation in program.operations:
        primitive, (output, *_) = operation.primitive, operation.outputs
        reads_pixels = not pixels.isdisjoint(operation.inputs)
        sources = [array for array in operation.inputs if array in weights]
        if reads_pixels and primitive in ("dot_general", "conv_general_dilated"):
            if len(sources) != 1:
                return None
            weight = np.asarray(weights[sources[0]], np.float32)
            if primitive == "conv_general_dilated":
                tiles = _filters(operation, weight)
            elif is_table or ordered.isdisjoint(operation.inputs):
                return None
            else:
                tiles = _weights_of_units(operation, weight, sources[0], num_pixels)
            return tiles if tiles is not None and _is_square(tiles.shape[1]) else None
        keeps_size = math.prod(program.shapes[output]) == inputs.size
        if reads_pixels and keeps_size and primitive in ELEMENTWISE | RESHAPES | {"transpose"}:
            pixels.add(output)
            if primitive != "transpose" and not ordered.isdisjoint(operation.inputs):
                ordered.add(output)
        elif primitive in ("convert_element_type", "copy") and sources:
            weights[output] = weights[sources[0]]
    return None


def _filters(operation: Operation, weight: np.ndarray) -> np.ndarray | None:
    """Filters of a convolution along two axes, `[filter * channel, height * width]`."""
    filters = weight.transpose(operation.params["dimension_numbers"].rhs_spec)
    if filters.ndim != 4 or filters.shape[2] != filters.shape[3] or filters.shape[2] == 1:
        return None
    return filters.reshape(filters.shape[0] * filters.shape[1], -1)


def _weights_of_units(
    operation: Operation, weight: np.ndarray, weight_array: int, num_pixels: int
) -> np.ndarray | None:
    """Weights of a product that sums over all pixels, `[unit, pixel]`."""
    contracted = operation.params["dimension_numbers"][0]
    weight_axes, pixel_axes = (
        contracted if operation.inputs[0] == weight_array else contracted[::-1]
    )
    by_axis = sorted(zip(pixel_axes, weight_axes, strict=True))
    axes = [weight_axis for _, weight_axis in by_axis]
    if math.prod(weight.shape[axis] for axis in axes) != num_pixels:
        return None
    return np.moveaxis(weight, axes, range(len(axes))).reshape(num_pixels, -1).T


def _is_square(length: int) -> bool:
    return math.isqrt(length) ** 2 == length
