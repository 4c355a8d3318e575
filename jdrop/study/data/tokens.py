"""Labels per token: the tokens with a label are what is scored, one after another.

Arrays of sequences `[sequence, length]` become arrays `[token]` of all positions with a label, in
the order of the sequences. Arrays of single examples stay as they are.
"""

from typing import Any

import numpy as np

from jdrop.study.data.dataset import Dataset


def labels_of_tokens(labels: np.ndarray) -> np.ndarray:
    """The labels of all positions that have one, `[token]`, from labels `[sequence, length]`.

    Example:
        >>> labels_of_tokens(np.array([[3, 1, -1], [2, -1, -1]]))
        array([3, 1, 2])
    """
    return labels if labels.ndim == 1 else labels[labels >= 0]


def outputs_of_tokens(outputs: Any, labels: np.ndarray) -> Any:
    """The outputs for tokens with a label.

    Args:
        outputs: `[member, sequence, length, class]`.
        labels: `[sequence, length]`, below 0 where there is no label.

    Returns:
        `[member, token, class]`.
    """
    if labels.ndim == 1:
        return outputs
    rows = np.flatnonzero(labels >= 0)
    return outputs.reshape(len(outputs), -1, outputs.shape[-1])[:, rows]


def sequences_of_tokens(labels: np.ndarray) -> np.ndarray:
    """The index of the sequence of each token with a label, `[token]`."""
    return np.arange(len(labels)) if labels.ndim == 1 else np.nonzero(labels >= 0)[0]


def groups_of_tokens(data: Dataset) -> tuple[str | None, np.ndarray | None, list[str] | None]:
    """The groups of what is scored: name of a group, group of each test token, and their labels.

    The tokens of a sequence belong together, and so do the sequences of a group of the user.
    """
    labels = None if data.group_labels is None else list(data.group_labels)
    if not data.is_per_token:
        return data.group_name, data.test_groups, labels
    sequences = sequences_of_tokens(data.test_labels).astype(np.int32)
    if data.test_groups is None:
        return "sequence", sequences, [str(index) for index in range(len(data.test_labels))]
    return data.group_name, data.test_groups[sequences], labels
