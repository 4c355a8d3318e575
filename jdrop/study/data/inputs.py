"""Inputs of the user, in memory or in a source: checked, and given the dtypes of networks."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jdrop.study.data.dataset import DataError, Progress, no_progress, require_finite, unmasked
from jdrop.study.data.streams import Stream, chunks, is_too_large, shapes_of, with_length


def checked_inputs(
    name: str, inputs: Any, *, as_features: bool = False, progress: Progress = no_progress
) -> Any:
    """Inputs with the dtypes that networks take; raises if they are no finite numbers.

    Floats and uint8, as images are stored, become float32. Other integers become int32, since they
    may be token ids. Booleans stay Boolean inside a pytree, where they are masks. An array of
    Booleans alone becomes float32.

    Args:
        name: for messages.
        inputs: an array `[example, feature, ...]`, a list of numbers of this shape, or any other
            pytree of arrays `[example, ...]`, such as a dictionary or a tuple; or sources, alone
            or in a pytree, see `is_source`.
        as_features: whether the inputs are features and become float32.
        progress: is called as a source is read.

    Returns:
        Arrays in memory; a `Stream` if there are sources and together they are too large.

    Raises:
        DataError: no numbers, values that are masked, not finite or too large, or arrays with
            different numbers of examples.

    Example:
        >>> inputs = {"tokens": np.ones((2, 5), int), "mask": np.ones((2, 5), bool)}
        >>> {name: str(array.dtype) for name, array in checked_inputs("inputs", inputs).items()}
        {'mask': 'bool', 'tokens': 'int32'}
    """
    if any(map(is_source, jax.tree.leaves(inputs) if is_tree(inputs) else [inputs])):
        return _checked_sources(name, inputs, as_features, progress)
    if not is_tree(inputs):
        array = unmasked(name, inputs)
        _require_numbers(name, array)
        if array.ndim < 2 or 0 in array.shape:
            raise DataError(
                f"{name} must be [example, feature, ...] with at least one of each, got the shape "
                f"{array.shape}; a single feature is `{name}[:, None]`."
            )
        return _converted(name, array, as_features or array.dtype.kind == "b")
    paths, tree = jax.tree_util.tree_flatten_with_path(inputs)
    if not paths:
        raise DataError(f"{name} must hold at least one array, got {inputs!r}.")
    arrays: list[np.ndarray] = []
    for path, leaf in paths:
        leaf_name = f"{name}{jax.tree_util.keystr(path)}"
        array = unmasked(leaf_name, leaf)
        _require_numbers(leaf_name, array)
        if array.ndim < 1 or 0 in array.shape:
            raise DataError(
                f"{leaf_name} must be [example, ...] with at least one example, got the shape "
                f"{array.shape}."
            )
        if len(array) != len(arrays[0] if arrays else array):
            raise DataError(
                f"all arrays of {name} must have the same number of examples, got "
                f"{len(arrays[0])} and, in {leaf_name}, {len(array)}."
            )
        arrays.append(_converted(leaf_name, array, as_features))
    return jax.tree.unflatten(tree, arrays)


def is_tree(inputs: Any) -> bool:
    """Whether inputs are a pytree of arrays, and not one array or a list of its rows.

    A tuple without an array in it is rows of numbers.

    Example:
        >>> is_tree((np.ones(2), np.ones(2))), is_tree(((1, 2), (3, 4))), is_tree([np.ones(2)])
        (True, False, False)
    """
    if inputs is None or isinstance(inputs, list) or jax.tree_util.all_leaves([inputs]):
        return False
    return not isinstance(inputs, tuple) or any(
        is_source(value) or np.ndim(value) for value in jax.tree.leaves(inputs)
    )


def is_source(inputs: Any) -> bool:
    """Whether inputs are read example by example, as they may not fit in memory.

    Sources are memory-mapped arrays of NumPy, arrays of HDF5 and Zarr, and all other objects with
    `len(source)` and `source[index]` that are no arrays, lists or tuples.

    Example:
        >>> is_source(np.ones((2, 3))), is_source([[1.0], [2.0]]), is_source(range(3))
        (False, False, True)
    """
    if isinstance(inputs, np.memmap):
        return True
    if not (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")):
        return False
    if isinstance(inputs, list | tuple | str | bytes | Mapping):
        return False
    # Arrays of HDF5 and Zarr tell the chunks in which they are stored.
    return not hasattr(inputs, "__array__") or (
        hasattr(inputs, "chunks") and hasattr(inputs, "dtype")
    )


def _checked_sources(name: str, inputs: Any, as_features: bool, progress: Progress) -> Any:
    """The examples of sources in memory, or a stream of them. Reads each of them once."""
    leaves, tree = jax.tree.flatten(inputs) if is_tree(inputs) else ([inputs], None)
    sizes = [len(leaf) if is_source(leaf) else (np.shape(leaf) or (0,))[0] for leaf in leaves]
    if min(sizes) < 1 or min(sizes) != max(sizes):
        raise DataError(
            f"all arrays and sources of {name} must have the same number of examples, at least 1, "
            f"got {', '.join(map(str, sizes))}."
        )

    def read(rows: np.ndarray, name: str = name) -> Any:
        arrays = [_read_rows(name, leaf, rows) for leaf in leaves]
        examples = arrays[0] if tree is None else jax.tree.unflatten(tree, arrays)
        return checked_inputs(name, examples, as_features=as_features)

    every_row = np.arange(sizes[0])
    stream = Stream(read, with_length(shapes_of(read(every_row[:1])), len(every_row)))
    if not is_too_large(stream):
        return read(every_row)
    slices = chunks(stream)
    for done, rows in enumerate(slices, 1):
        chunk = every_row[rows]
        chunk_name = f"{name}[{rows.start}:{rows.stop}]"
        shapes = shapes_of(read(chunk, chunk_name))
        expected = with_length(stream.shapes, len(chunk))
        if shapes != expected:
            raise DataError(
                f"all examples must be as the first one is, which makes {chunk_name} {expected}, "
                f"got {shapes}."
            )
        progress(f"checking {name}", done, len(slices))
    return stream


def _read_rows(name: str, source: Any, rows: np.ndarray) -> Any:
    """The examples of a source or an array, `[row, ...]`."""
    if not is_source(source) or isinstance(source, np.memmap):
        return np.asarray(source)[rows]
    # In rising order, as disks read fastest, and each example once.
    indices, place = np.unique(rows, return_inverse=True)
    records = [source[int(index)] for index in indices]
    try:
        return jax.tree.map(lambda *arrays: np.stack(arrays)[place], *records)
    except ValueError as error:
        raise DataError(
            f"all examples of {name} must have the same structure and shapes: {error}"
        ) from error


def require_alike(name: str, inputs: Any, train: Any) -> None:
    """Raises if examples differ from those of the training inputs in structure, shape or dtype."""
    inputs, train = shapes_of(inputs), shapes_of(train)
    structure: Any
    structure, expected_structure = jax.tree.structure(inputs), jax.tree.structure(train)
    if structure != expected_structure:
        raise DataError(
            f"{name} must have the structure of the training inputs, {expected_structure}, got "
            f"{structure}."
        )
    for (path, array), expected in zip(
        jax.tree_util.tree_leaves_with_path(inputs), jax.tree.leaves(train), strict=True
    ):
        leaf_name = f"{name}{jax.tree_util.keystr(path)}"
        if array.shape[1:] != expected.shape[1:]:
            raise DataError(
                f"{leaf_name} must have examples of shape {expected.shape[1:]}, as the training "
                f"inputs have, got {array.shape[1:]}."
            )
        if array.dtype != expected.dtype:
            raise DataError(
                f"{leaf_name} must be {_kind(expected)}, as the training inputs are, got "
                f"{_kind(array)}; convert one of them."
            )


def _kind(array: Any) -> str:
    return {"f": "floats", "i": "integers", "b": "Booleans"}[array.dtype.kind]


def _require_numbers(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} must be numbers, got the dtype {array.dtype}.")


def _converted(name: str, array: np.ndarray, as_features: bool) -> np.ndarray:
    if not as_features and array.dtype.kind == "b":
        return np.ascontiguousarray(array)
    if not as_features and array.dtype.kind in "iu" and array.dtype != np.uint8:
        bounds = np.iinfo(np.int32)
        if array.min() < bounds.min or array.max() > bounds.max:
            raise DataError(
                f"{name} must be integers that int32 holds, got {array.min()} to {array.max()}; "
                "give floats if they are features."
            )
        return np.ascontiguousarray(array, np.int32)
    require_finite(name, array)
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(single).all():
        raise DataError(
            f"{name} must lie within {np.finfo(np.float32).max:.2g} of 0, as float32 numbers do, "
            f"got {array[~np.isfinite(single)][0]}; scale them."
        )
    return single
