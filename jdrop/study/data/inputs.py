"""Inputs of the user, an array or a pytree of arrays: checked, and given the dtypes of networks."""

from typing import Any

import jax
import numpy as np

from jdrop.study.data.dataset import DataError, require_finite, unmasked


def checked_inputs(name: str, inputs: Any, *, as_features: bool = False) -> Any:
    """Inputs with the dtypes that networks take; raises if they are no finite numbers.

    Floats and uint8, as images are stored, become float32. Other integers become int32, since they
    may be token ids. Booleans stay Boolean inside a pytree, where they are masks. An array of
    Booleans alone becomes float32.

    Args:
        name: for messages.
        inputs: an array `[example, feature, ...]`, a list of numbers of this shape, or any other
            pytree of arrays `[example, ...]`, such as a dictionary or a tuple.
        as_features: whether the inputs are features and become float32.

    Raises:
        DataError: no numbers, values that are masked, not finite or too large, or arrays with
            different numbers of examples.

    Example:
        >>> inputs = {"tokens": np.ones((2, 5), int), "mask": np.ones((2, 5), bool)}
        >>> {name: str(array.dtype) for name, array in checked_inputs("inputs", inputs).items()}
        {'mask': 'bool', 'tokens': 'int32'}
    """
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
    return not isinstance(inputs, tuple) or any(np.ndim(value) for value in jax.tree.leaves(inputs))


def require_alike(name: str, inputs: Any, train: Any) -> None:
    """Raises if examples differ from those of the training inputs in structure, shape or dtype."""
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


def _kind(array: np.ndarray) -> str:
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
