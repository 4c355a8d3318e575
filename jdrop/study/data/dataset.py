"""What a data set is, how its training examples are chosen, and how its labels are made noisy."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jdrop.study.data.streams import leaf_chunks, select, shapes_of, take
from jdrop.study.errors import UserError

Progress = Callable[[str, int, int], None]
"""`progress(description, done, total)`, called as the work goes on."""

MAX_SHUFFLED = 2000


class DataError(UserError):
    """The data is missing or wrong; the message says what is wrong and what is allowed."""


def no_progress(what: str, done: int, total: int) -> None:
    """Shows nothing."""


def quote(text: str) -> str:
    """Text from a file for a message: in quotes, printable, and at most 40 characters long."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def printable(name: str) -> str:
    r"""The name of a file as Unicode: "?" stands for bytes that are not UTF-8.

    Example:
        >>> import os
        >>> printable(os.fsdecode(b"caf\xe9.csv"))
        'caf?.csv'
    """
    return name.encode(errors="replace").decode()


def list_names(names: Iterable[str]) -> str:
    """Names from a file for a message: printable, and at most ten of them."""
    texts = [quote(name)[1:-1] for name in names]
    more = f" and {len(texts) - 10} more" if len(texts) > 10 else ""
    return f"{', '.join(texts[:10])}{more}"


def unmasked(name: str, array: Any) -> np.ndarray:
    """The array; raises if values are masked, which NumPy would forget."""
    if np.ma.is_masked(array):
        raise DataError(
            f"{name} must hold a value everywhere, but {np.ma.count_masked(array)} are masked; "
            "fill them in (`array.filled(...)`), or leave those examples out."
        )
    return np.asarray(array)


def require_finite(name: str, array: np.ndarray) -> None:
    """Raises if a value is infinite or NaN."""
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(index[0]) for index in np.nonzero(bad))
        raise DataError(
            f"{name} must be finite, but {int(bad.sum())} of {array.size} values are not, the "
            f"first at {first}; fill them in, or leave those examples out."
        )


@dataclass(frozen=True)
class Dataset:
    """Examples to train on and examples to test on.

    Attributes:
        name: for reports and messages.
        train_inputs: float32 or int32 [example, ...], or a pytree of such arrays and of Boolean
            ones; or a `Stream` of them.
        train_labels: int32 [example], in [0, num_classes), with the label noise, if any; in
            regression float32 [example], standardised. With labels per token int32
            [example, length], where -1 marks positions without a label.
        test_inputs: as `train_inputs`.
        test_labels: as `train_labels`, never noisy.
        num_classes: count of classes; None in regression. With labels per token at first the
            largest label and 1 more, then as many as the model has outputs.
        label_noise: share of training labels that were made wrong.
        target_mean: mean of the training targets in their own unit; 0 in classification.
        target_scale: their standard deviation; 1 in classification.
        ood_name: what the out-of-distribution inputs are.
        ood_inputs: out-of-distribution inputs, as `test_inputs`; None where there are none.
        group_name: what one group of examples is, such as "patient"; None where the examples are
            taken as independent.
        train_groups: int32 [example], from 0; None where the groups are not known.
        test_groups: as `train_groups`; equal numbers are the same group. None without `group_name`.
        group_labels: the groups by their number; None without `group_name`.
    """

    name: str
    train_inputs: Any
    train_labels: np.ndarray
    test_inputs: Any
    test_labels: np.ndarray
    num_classes: int | None
    label_noise: float = 0.0
    target_mean: float = 0.0
    target_scale: float = 1.0
    ood_name: str | None = None
    ood_inputs: Any = None
    group_name: str | None = None
    train_groups: np.ndarray | None = None
    test_groups: np.ndarray | None = None
    group_labels: tuple[str, ...] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers to predict, not classes."""
        return self.num_classes is None

    @property
    def train_group_name(self) -> str | None:
        """What one group of training examples or tokens is; None where each is by itself."""
        if self.train_groups is not None:
            return self.group_name
        return "sequence" if self.is_per_token else None

    @property
    def is_per_token(self) -> bool:
        """Whether the positions of a sequence have labels, and not the example as a whole."""
        return self.train_labels.ndim > 1

    @property
    def output_bytes(self) -> int:
        """The memory that the outputs of one network for one example take, in float32."""
        return 4 * math.prod(self.train_labels.shape[1:]) * (self.num_classes or 1)

    @property
    def has_features(self) -> bool:
        """Whether the inputs are one array of floats, as simple models take them."""
        shapes = shapes_of(self.train_inputs)
        return isinstance(shapes, jax.ShapeDtypeStruct) and shapes.dtype.kind == "f"

    def train_on(self, chosen: np.ndarray) -> "Dataset":
        """The same data set with the chosen training examples: Booleans, or indices."""
        return replace(
            self,
            train_inputs=select(self.train_inputs, chosen),
            train_labels=self.train_labels[chosen],
            train_groups=None if self.train_groups is None else self.train_groups[chosen],
        )


def fingerprint(data: Dataset, progress: Progress = no_progress) -> str:
    """A hash of all examples, labels and groups; that of a stream is that of its arrays.

    Args:
        data: the examples.
        progress: is called as streams are read.
    """
    digest = hashlib.sha256()
    if data.group_name is not None:
        digest.update(f"groups: {data.group_name}".encode())
    parts = {
        "train": data.train_inputs,
        "train labels": data.train_labels,
        "test": data.test_inputs,
        "test labels": data.test_labels,
        "ood": data.ood_inputs,
        "train groups": data.train_groups,
        "test groups": data.test_groups,
    }
    for name, part in parts.items():
        if part is None:
            continue

        def show(done: int, total: int, name: str = name) -> None:
            progress(f"hashing the {name} inputs", done, total)

        for path, shape, arrays in leaf_chunks(part, show):
            digest.update(jax.tree_util.keystr(path).encode())  # Empty for a single array.
            digest.update(f"{shape.dtype}{shape.shape}".encode())
            for array in arrays:
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def subset(data: Dataset, size: int, seed: int) -> np.ndarray:
    """Chooses training examples, each class in proportion: a Boolean array, True = chosen.

    For one seed, a larger subset holds the smaller ones.

    Raises:
        DataError: `size` is below 1 or above the count of training examples.
    """
    if not 1 <= size <= len(data.train_labels):
        raise DataError(
            f"train_size must lie in [1, {len(data.train_labels)}], the training examples that "
            f"there are, got {size}."
        )
    return stratified(generator(seed, "subset"), strata(data.train_labels), size)


def strata(labels: np.ndarray) -> np.ndarray:
    """The class of each example, integers `[example]`; all equal where examples have no class."""
    if labels.dtype.kind == "f" or labels.ndim > 1:
        return np.zeros(len(labels), int)
    return labels


def with_label_noise(data: Dataset, share: float, seed: int) -> Dataset:
    """The same data set with some training labels wrong, uniformly among the other classes.

    Exactly `round(share * num_examples)` are wrong. More noise keeps the labels that less noise
    makes wrong.

    Raises:
        DataError: the data set is a regression, its labels are noisy already, or the share is
            outside [0, 1).
    """
    if not 0 <= share < 1:
        raise DataError(
            f"label_noise must lie in [0, 1), got {share}. It is the share of training labels "
            "that are made wrong."
        )
    if share == 0:
        return data
    if data.num_classes is None:
        raise DataError("label_noise is for classification, but the targets are numbers.")
    if data.is_per_token:
        raise DataError(
            "label_noise is for one label per example, but the labels are per token; make the "
            "labels noisy before you give them."
        )
    if data.label_noise:
        raise DataError(f"{data.label_noise:.0%} of the labels are made wrong already.")
    labels = noisy(generator(seed, "label noise"), data.train_labels, data.num_classes, share)
    return replace(data, train_labels=labels.astype(np.int32), label_noise=share)


def shuffled(inputs: Any, seed: int) -> np.ndarray:
    """Shuffles the features of each of the first inputs, at most `MAX_SHUFFLED`."""
    first = take(inputs, slice(MAX_SHUFFLED))
    flat = first.reshape(len(first), -1)
    return generator(seed, "shuffled").permuted(flat, axis=1).reshape(first.shape)


def named_seed(seed: int, name: str) -> np.random.SeedSequence:
    """The child of a seed that belongs to a name; different names give independent children.

    Raises:
        DataError: the seed is negative.
    """
    if seed < 0:
        raise DataError(f"seed must not be negative, got {seed}; take 0 or more.")
    return np.random.SeedSequence(seed, spawn_key=tuple(name.encode()))


def generator(seed: int, name: str) -> np.random.Generator:
    """A generator for one purpose, by its name."""
    return np.random.default_rng(named_seed(seed, name))


def stratified(rng: np.random.Generator, labels: np.ndarray, size: int) -> np.ndarray:
    """Chooses `size` examples, each class in proportion: a Boolean array, True = chosen.

    A queue holds the k-th of the n examples of a class, in random order, at (k + 1/2) / n. The
    first `size` of the queue are chosen: the method of Webster and Sainte-Laguë.
    """
    order = rng.permutation(len(labels))
    queue_position = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        queue_position[members] = (np.arange(len(members)) + 0.5) / len(members)
    chosen = np.zeros(len(labels), bool)
    chosen[order[np.argsort(queue_position[order], kind="stable")[:size]]] = True
    return chosen


def noisy(
    rng: np.random.Generator, labels: np.ndarray, num_classes: int, share: float
) -> np.ndarray:
    """Labels of which `round(share * len(labels))` are wrong."""
    # Drawn for all labels, so that a larger share keeps the wrong labels of a smaller one.
    wrong = (labels + rng.integers(1, num_classes, len(labels))) % num_classes
    flipped = rng.permutation(len(labels)) < round(share * len(labels))
    return np.where(flipped, wrong, labels)
