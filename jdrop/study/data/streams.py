"""Inputs in memory, and inputs that are read from their source as they are needed.

Inputs are a pytree of arrays `[example, ...]` or a `Stream`; the functions here take both.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jdrop.memory import machine_memory

CHUNK_BYTES = 2**28
"""Inputs and predictions of at most so many bytes are in use at a time, besides those in memory."""

MEMORY_SHARE = 1 / 4
"""Inputs that take more than this share of the memory are streamed."""


@dataclass(frozen=True)
class Stream:
    """Inputs that are read as they are needed, since the memory may not hold all of them.

    Attributes:
        read: `read(rows)`: the inputs of the examples with these indices, `[row, ...]`.
        shapes: the shapes and dtypes of all inputs, a pytree of `jax.ShapeDtypeStruct`
            `[example, ...]`.
    """

    read: Callable[[np.ndarray], Any]
    shapes: Any


def shapes_of(inputs: Any) -> Any:
    """The shapes and dtypes of all inputs, a pytree of `jax.ShapeDtypeStruct` `[example, ...]`."""
    if isinstance(inputs, Stream):
        return inputs.shapes
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), inputs)


def with_length(shapes: Any, length: int) -> Any:
    """The shapes and dtypes of so many examples."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct((length, *shape.shape[1:]), shape.dtype), shapes
    )


def with_sharding(shapes: Any, sharding: Sharding) -> Any:
    """The shapes and dtypes of arrays that lie so on the devices."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes
    )


def num_examples(inputs: Any) -> int:
    """How many examples inputs hold."""
    return int(jax.tree.leaves(shapes_of(inputs))[0].shape[0])


def num_bytes(inputs: Any) -> int:
    """How much memory all inputs take."""
    leaves = jax.tree.leaves(shapes_of(inputs))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def take(inputs: Any, rows: Any) -> Any:
    """The chosen examples of inputs, in memory: Booleans, indices, or a slice.

    Example:
        >>> take({"tokens": np.arange(6).reshape(3, 2)}, slice(1))
        {'tokens': array([[0, 1]])}
    """
    if isinstance(inputs, Stream):
        return inputs.read(np.arange(num_examples(inputs))[rows])
    return jax.tree.map(lambda array: array[rows], inputs)


def select(inputs: Any, rows: np.ndarray) -> Any:
    """The chosen examples of inputs, Booleans or indices. Those of a stream are not read yet."""
    if not isinstance(inputs, Stream):
        return take(inputs, rows)
    chosen = np.arange(num_examples(inputs))[rows]
    return Stream(lambda rows: inputs.read(chosen[rows]), with_length(inputs.shapes, len(chosen)))


def join(first: Any, second: Any) -> Any:
    """The examples of two inputs, one after another. Those of a stream are not read yet."""
    if not isinstance(first, Stream) and not isinstance(second, Stream):
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), first, second)
    num_first = num_examples(first)

    def read(rows: np.ndarray) -> Any:
        of_first = rows < num_first
        if of_first.all():
            return take(first, rows)
        if not of_first.any():
            return take(second, rows - num_first)
        parts = take(first, rows[of_first]), take(second, rows[~of_first] - num_first)
        order = np.argsort(np.argsort(~of_first, kind="stable"))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[order], *parts)

    return Stream(read, with_length(shapes_of(first), num_first + num_examples(second)))


def chunks(inputs: Any, output_bytes: int = 0) -> list[slice]:
    """Divides examples into chunks of equal size, as few as `CHUNK_BYTES` allows.

    Args:
        inputs: an array, a pytree of arrays, or a stream.
        output_bytes: the memory that a prediction for one example takes.
    """
    num_rows = num_examples(inputs)
    bytes_per_example = num_bytes(inputs) / num_rows + output_bytes
    largest = max(1, int(CHUNK_BYTES / bytes_per_example))
    size = math.ceil(num_rows / math.ceil(num_rows / largest))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def leaf_chunks(
    inputs: Any, progress: Callable[[int, int], None]
) -> Iterator[tuple[Any, jax.ShapeDtypeStruct, Iterator[np.ndarray]]]:
    """Yields each array's path, its shape and dtype, and its values, chunk by chunk.

    Args:
        inputs: an array, a pytree of arrays, or a stream, which is read once for each array.
        progress: is called as `progress(done, total)` while a stream is read.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shapes_of(inputs))
    slices = chunks(inputs)

    def read(index: int) -> Iterator[np.ndarray]:
        for done, rows in enumerate(slices, 1):
            yield jax.tree.leaves(take(inputs, rows))[index]
            if isinstance(inputs, Stream):
                progress(index * len(slices) + done, len(leaves) * len(slices))

    for index, (path, shape) in enumerate(leaves):
        yield path, shape, read(index)


def is_too_large(inputs: Any) -> bool:
    """Whether inputs take more than `MEMORY_SHARE` of the machine's or the device's memory."""
    statistics = jax.local_devices()[0].memory_stats() or {}  # A CPU has none.
    memory = min(machine_memory(), statistics.get("bytes_limit", math.inf))
    return num_bytes(inputs) > MEMORY_SHARE * memory
