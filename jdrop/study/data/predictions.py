"""Predictions of networks that were trained elsewhere, read from an `.npz` and checked."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jdrop.study.data.arrays import read_npz, require_arrays
from jdrop.study.data.dataset import DataError, quote
from jdrop.study.data.groups import checked_groups, number_groups, read_groups


@dataclass(frozen=True)
class Predictions:
    """Predictions of networks that were trained elsewhere, for the same test examples.

    Attributes:
        log_probs: float32 `[member, example, class]` by method; those of "monte_carlo" are
            `[network, mask, example, class]`.
        labels: int32 `[example]`.
        groups: int32 `[example]`, equal for examples that belong together; None where they are
            taken as independent.
        group_labels: the groups by their number; None without groups.
    """

    log_probs: dict[str, np.ndarray]
    labels: np.ndarray
    groups: np.ndarray | None = None
    group_labels: tuple[str, ...] | None = None


def load_predictions(path: Path, groups_path: Path | None = None) -> Predictions:
    """Loads predictions from an `.npz`.

    The file holds the arrays `labels` `[example]` and `plain` `[member, example, class]`:
    normalised log-probabilities of independently trained networks. It also holds the methods to
    compare with them: `dropout` `[member, example, class]`, `monte_carlo` `[mask, example, class]`
    or `[network, mask, example, class]`, or any other name that begins with a letter or a digit,
    with the shape of `dropout`. It may hold `groups` `[example]`, integers or text.

    Args:
        path: the `.npz`.
        groups_path: file with the group of each example, see
            `jdrop.study.data.groups.read_groups`; it replaces the array `groups`.

    Raises:
        DataError: a file is missing or damaged, or an array has the wrong shape, dtype or values.

    Example:
        >>> import pathlib, tempfile
        >>> coin = np.full((4, 10, 2), np.log(0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "mine.npz")
        ...     np.savez(path, labels=np.arange(10) % 2, plain=coin, dropout=coin)
        ...     predictions = load_predictions(path)
        >>> predictions.log_probs["dropout"].shape
        (4, 10, 2)
    """
    arrays = read_npz(path)
    require_arrays(path, arrays, ("labels", "plain"))
    labels = arrays.pop("labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"labels of {path} must be integers [example], got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    groups, group_labels = _groups(path, arrays.pop("groups", None), groups_path, len(labels))
    log_probs = {}
    shape = arrays["plain"].shape[-1:]
    if shape == (1,):
        raise DataError(
            f"plain of {path} must have at least 2 classes, got 1; where there are two, give the "
            "log-probabilities of both."
        )
    for name, array in arrays.items():
        if not name[:1].isalnum():  # A spreadsheet would take "=x" in `scores.csv` for a formula.
            raise DataError(
                f"names of the methods of {path} must begin with a letter or a digit, got "
                f"{quote(name)}; rename the array."
            )
        if name == "monte_carlo" and array.ndim == 3:
            array = array[None]
        wanted = 4 if name == "monte_carlo" else 3
        if array.ndim != wanted or array.shape[-2:] != (len(labels), *shape) or 0 in array.shape:
            axes = "[network, mask, example, class]" if wanted == 4 else "[member, example, class]"
            raise DataError(
                f"{name} of {path} must be {axes} with the {len(labels)} examples of labels and "
                f"the classes of plain, got the shape {array.shape}."
            )
        log_probs[name] = _log_probs(f"{name} of {path}", array)
    if len(arrays["plain"]) < 4:
        raise DataError(
            f"plain of {path} must hold at least 4 networks, two groups of two, got "
            f"{len(arrays['plain'])}."
        )
    if len(arrays) == 1:
        raise DataError(
            f"{path} must hold something to compare with plain: dropout, monte_carlo or another "
            "method."
        )
    if labels.min() < 0 or labels.max() >= shape[0]:
        raise DataError(
            f"labels of {path} must lie in [0, {shape[0]}), the classes of plain, got "
            f"{labels.min()} to {labels.max()}."
        )
    for name, array in log_probs.items():
        label_log_probs = array[..., np.arange(len(labels)), labels]
        ruled_out = np.argwhere(np.isneginf(label_log_probs))
        if len(ruled_out):
            *network, example = (int(index) for index in ruled_out[0])
            raise DataError(
                f"{name} of {path} gives the right class the probability 0 {len(ruled_out)} "
                f"times, first in {network} of the networks at example {example}, and its NLL is "
                "infinite; take log_softmax of the logits in floats that can hold it."
            )
    return Predictions(log_probs, labels.astype(np.int32), groups, group_labels)


def _groups(
    path: Path, groups: np.ndarray | None, groups_path: Path | None, num_examples: int
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    name = f"groups of {path}"
    if groups_path is not None:
        name, groups = str(groups_path), read_groups(groups_path)
    if groups is None:
        return None, None
    groups = checked_groups(name, groups)
    if len(groups) != num_examples:
        raise DataError(
            f"{name} must hold one group for each of the {num_examples} examples, got "
            f"{len(groups)}."
        )
    return number_groups(None, groups)[1:]


def _log_probs(name: str, array: np.ndarray) -> np.ndarray:
    """Log-probabilities as float32; raises if they are not normalised."""
    if array.dtype.kind != "f":
        raise DataError(f"{name} must be log-probabilities, floats, got the dtype {array.dtype}.")
    # Log-probabilities below the range of float32 become -inf: the probability 0.
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if np.isnan(array).any():
        raise DataError(f"{name} must be numbers, but {int(np.isnan(array).sum())} are NaN.")
    sums = np.exp(np.minimum(array, 50)).sum(-1)
    if np.abs(sums - 1).max() > 1e-3:
        hint = "take `log_softmax` of logits"
        if array.min() >= 0 and np.abs(array.sum(-1) - 1).max() < 1e-3:
            hint = "these are probabilities, take their logarithm"
        raise DataError(
            f"{name} must be normalised log-probabilities, whose exponentials sum to 1, but they "
            f"sum to {sums.min():.3g} to {sums.max():.3g}; {hint}."
        )
    return array
