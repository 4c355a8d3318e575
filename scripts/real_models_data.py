"""The data of the studies in `real_models.py`: images, points, words and characters.

The texts ship with Python and with the packages of the comparison. So they change with the versions
of these. Training and test examples never come from the same file or chapter.
"""

import ast
import importlib.util
import pydoc_data.topics
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jdrop.study.data import load

PACKAGES = ("jax", "matplotlib", "numpy", "pandas", "scipy", "sklearn")
"""The packages whose docstrings are told apart: the classes of `docstrings`."""

PADDING, UNKNOWN = 0, 1
"""Tokens that stand for no word, and for a word that the vocabulary lacks."""


@dataclass(frozen=True)
class Examples:
    """Examples as `jdrop.compare` takes them; `groups` are None for independent examples."""

    inputs: Any
    labels: np.ndarray
    test_inputs: Any
    test_labels: np.ndarray
    groups: np.ndarray | None = None
    test_groups: np.ndarray | None = None


def fashion_mnist(data_dir: Path | None, train_size: int, test_size: int) -> Examples:
    """Images `[example, 28, 28, 1]` in [0, 1], the first of the test images."""
    data = load("fashion-mnist", train_size=train_size, label_noise=0.0, seed=0, data_dir=data_dir)
    train, test = (
        images.reshape(-1, 28, 28, 1)
        for images in (data.train_inputs, data.test_inputs[:test_size])
    )
    return Examples(train, data.train_labels, test, data.test_labels[:test_size])


def digits_as_points(train_size: int) -> Examples:
    """The pixels of scikit-learn's digits that are not white, as a set of points.

    A point has the coordinates x, y and how dark it is, in [-1, 1]. The groups are the forms that
    the writers filled in.
    """
    data = load("digits", train_size=train_size, label_noise=0.0, seed=0, data_dir=None)
    points = _points(np.concatenate([data.train_inputs, data.test_inputs]))
    inputs, test_inputs = (
        {name: array[rows] for name, array in points.items()}
        for rows in (slice(train_size), slice(train_size, None))
    )
    return Examples(
        inputs,
        data.train_labels,
        test_inputs,
        data.test_labels,
        data.train_groups,
        data.test_groups,
    )


def _points(images: np.ndarray) -> dict[str, np.ndarray]:
    """Points `[example, point, 3]` and a mask `[example, point]`, from pixels in [0, 1]."""
    y, x = np.indices((8, 8)).reshape(2, 64) / 3.5 - 1
    points = np.stack(np.broadcast_arrays(x, y, 2 * images - 1), -1)
    # The points of a set stand first, its padding last.
    order = np.argsort(images == 0, 1, kind="stable")
    most = (images > 0).sum(1).max()
    return {
        "points": np.take_along_axis(points, order[..., None], 1)[:, :most].astype(np.float32),
        "mask": np.take_along_axis(images > 0, order, 1)[:, :most],
    }


def docstrings(
    *, per_package: int, test_share: float = 0.4, length: int = 30, vocabulary: int = 1000
) -> Examples:
    """The first words of docstrings; the label is the package, the group is the file.

    Names of packages are left out, and so is what follows the first section of a docstring, whose
    form would give the package away.

    Args:
        per_package: how many docstrings of each of `PACKAGES`, at most 5 from one file.
        test_share: the share of a package's files whose docstrings are test examples.
        length: how many words at most.
        vocabulary: how many tokens: the words that are most frequent in the training examples,
            `PADDING` and `UNKNOWN`.
    """
    rng = np.random.default_rng(0)
    words: list[list[str]] = []
    labels, groups, is_test = [], [], []
    for label, package in enumerate(PACKAGES):
        of_package = 0
        for path, texts in _documents(package, rng):
            goes_to_test = rng.random() < test_share
            for text in texts[: per_package - of_package]:
                words.append(text[:length])
                labels.append(label)
                groups.append(path)
                is_test.append(goes_to_test)
                of_package += 1
            if of_package == per_package:
                break
    test = np.array(is_test)
    counts = Counter(
        word for text, left_out in zip(words, is_test, strict=True) if not left_out for word in text
    )
    known = [word for word, _ in counts.most_common(vocabulary - 2)]
    tokens = {word: token for token, word in enumerate(known, UNKNOWN + 1)}
    inputs = {
        "tokens": _padded([[tokens.get(w, UNKNOWN) for w in text] for text in words], length),
        "lengths": np.array([len(text) for text in words]),
    }
    train_inputs, test_inputs = (
        {name: array[rows] for name, array in inputs.items()} for rows in (~test, test)
    )
    label_array, group_array = np.array(labels), np.array(groups)
    return Examples(
        train_inputs,
        label_array[~test],
        test_inputs,
        label_array[test],
        group_array[~test],
        group_array[test],
    )


def _documents(package: str, rng: np.random.Generator) -> Iterator[tuple[str, list[list[str]]]]:
    """The files of a package in random order, each with the words of at most 5 docstrings."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    paths = sorted(path for path in root.rglob("*.py") if "tests" not in path.parts)
    seen: set[str] = set()
    for index in rng.permutation(len(paths)):
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(paths[index].read_text())
        documents = []
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            text = re.split(r"\n\s*(?:\w+:\n|\w+\n\s*---)", ast.get_docstring(node) or "")[0]
            words = re.findall("[a-z]+", text.lower())
            words = [word for word in words if word not in PACKAGES]
            # Copies of a docstring would be in the training and the test examples.
            if len(words) >= 8 and text not in seen:
                documents.append(words)
            seen.add(text)
        if documents:
            chosen = rng.permutation(len(documents))[:5]
            yield str(paths[index].relative_to(root.parent)), [documents[i] for i in chosen]


def characters(*, per_topic: int, test_share: float = 0.4, length: int = 64) -> Examples:
    """Windows of the topics of Python's `help()`; the labels are the characters that follow.

    A window has `length` characters, the last of a topic fewer. The label -1 marks what is missing.

    Args:
        per_topic: how many windows of a topic at most, which is their group.
        test_share: the share of the topics that are tested on.
        length: of a window.
    """
    rng = np.random.default_rng(0)
    topics = sorted(pydoc_data.topics.topics)
    is_test = rng.random(len(topics)) < test_share
    texts: dict[bool, list[str]] = {False: [], True: []}
    names: dict[bool, list[str]] = {False: [], True: []}
    for topic, goes_to_test in zip(topics, is_test, strict=True):
        text = pydoc_data.topics.topics[topic]
        starts = np.arange(0, len(text) - 1, length)
        for start in np.sort(rng.permutation(starts)[:per_topic]):
            texts[goes_to_test].append(text[start : start + length + 1])
            names[goes_to_test].append(topic)
    known = sorted({character for text in texts[False] for character in text})
    tokens = {character: token for token, character in enumerate(known, UNKNOWN + 1)}

    def read(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [[tokens.get(character, UNKNOWN) for character in text] for text in texts]
        following = _padded([text[1:] for text in ids], length)
        return _padded([text[:-1] for text in ids], length), np.where(following, following, -1)

    return Examples(
        *read(texts[False]), *read(texts[True]), np.array(names[False]), np.array(names[True])
    )


def _padded(texts: list[list[int]], length: int) -> np.ndarray:
    """Tokens `[text, length]`, with `PADDING` at the end."""
    tokens = np.full((len(texts), length), PADDING, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens
