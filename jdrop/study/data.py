"""The data sets of the comparison: chosen examples, label noise, and files in MNIST's form.

Tables and arrays of the user's own are in `jdrop.study.tables`.

Arrays out; nothing here trains, augments or plots.
"""

import gzip
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

DATASETS = ("digits", "mnist", "fashion-mnist")

NUM_CLASSES = 10  # of each of DATASETS

DIGITS_TRAIN_SIZE = 500  # where none is given

MIRRORS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

SHA256 = {
    "mnist": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "fashion-mnist": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}
"""Of the gzipped FILES, in their order, as published."""


OOD_DATASETS = ("mnist", "fashion-mnist", "notmnist")
"""Whose test images may stand for inputs of another kind."""

MAX_SHUFFLED = 2000

MAX_OOD_IMAGES = 10_000


class DataError(ValueError):
    """What was asked of the data cannot be had; the message says what can."""


@dataclass(frozen=True)
class Dataset:
    """Examples to train on and examples to test on.

    Attributes:
        name: for people.
        train_inputs: float32 [example, ...].
        train_labels: int32 [example], in [0, num_classes), with the label noise, if any; in
            regression float32 [example], standardised.
        test_inputs: as `train_inputs`.
        test_labels: as `train_labels`, never noisy.
        num_classes: how many classes there are; None in regression.
        label_noise: the share of training labels that were made wrong.
        target_mean: of the training targets in their own unit; 0 in classification.
        target_scale: their standard deviation; 1 in classification.
        ood_name: of inputs of another kind.
        ood_inputs: as `test_inputs`; None where there are none.
    """

    name: str
    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    num_classes: int | None
    label_noise: float = 0.0
    target_mean: float = 0.0
    target_scale: float = 1.0
    ood_name: str | None = None
    ood_inputs: np.ndarray | None = None

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers to come close to, not classes."""
        return self.num_classes is None

    def train_on(self, chosen: np.ndarray) -> "Dataset":
        """The same with these training examples only: a Boolean for each, or their numbers."""
        return replace(
            self, train_inputs=self.train_inputs[chosen], train_labels=self.train_labels[chosen]
        )


def subset(data: Dataset, size: int, seed: int) -> np.ndarray:
    """Chooses training examples, each class in proportion: a Boolean for each, True = chosen.

    For one seed, a larger subset holds the smaller ones.

    Raises:
        DataError: more examples than there are, or none.
    """
    if not 1 <= size <= len(data.train_labels):
        raise DataError(
            f"train_size must lie in [1, {len(data.train_labels)}], the training examples that "
            f"there are, got {size}."
        )
    groups = np.zeros(len(data.train_labels), int) if data.is_regression else data.train_labels
    return stratified(generator(seed, "subset"), groups, size)


def with_label_noise(data: Dataset, share: float, seed: int) -> Dataset:
    """The same with wrong training labels, uniformly among the other classes.

    Exactly `round(share * examples)` are wrong; more noise keeps the wrong labels of less.

    Raises:
        DataError: in regression; labels that are noisy already; a share out of [0, 1).
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
    if data.label_noise:
        raise DataError(f"{data.label_noise:.0%} of the labels are made wrong already.")
    labels = noisy(generator(seed, "label noise"), data.train_labels, data.num_classes, share)
    return replace(data, train_labels=labels.astype(np.int32), label_noise=share)


def load(
    name: str,
    *,
    train_size: int | None,
    label_noise: float,
    seed: int,
    data_dir: Path | None,
    ood: str | None = None,
) -> Dataset:
    """Loads a data set, with as many training examples and wrong labels as are asked for.

    The training examples are a stratified subset: each class has the share that it has in the
    whole. For one name and seed, a larger subset holds the smaller ones, and more noise keeps the
    wrong labels of less, so curves over either are paired. The noise does not move the subset.

    Args:
        name: "digits" (1797 scans of 8x8, part of scikit-learn), "mnist" or "fashion-mnist"
            (60,000 + 10,000 images of 28x28).
        train_size: number of training examples, at least one for each class. None is 500 for
            digits, of which all others are the test set, and elsewhere all that are published.
        label_noise: share of training labels, in [0, 1), that are replaced by a wrong one,
            uniformly among the other classes; exactly `round(label_noise * train_size)` are.
        seed: not negative; it chooses the subset and the wrong labels.
        data_dir: where the four files in MNIST's form lie, gzipped or not: in its folder `name` or
            in itself. None downloads them once, into the user's cache. Not used for digits.
        ood: where inputs of another kind come from: the test images, at most 10,000, of another of
            `OOD_DATASETS`, in the folder of its name in `data_dir`. None shuffles the pixels of
            at most 2000 test images, of each in an order of its own.

    Raises:
        DataError: an argument out of range; files that are missing, damaged, or do not belong
            together; a download that failed.

    Example:
        >>> data = load("digits", train_size=100, label_noise=0.1, seed=0, data_dir=None)
        >>> data.train_inputs.shape, data.test_inputs.shape
        ((100, 64), (1697, 64))
    """
    if name not in DATASETS:
        raise DataError(f"name must be one of {', '.join(DATASETS)}, got {name!r}.")
    if not 0 <= label_noise < 1:
        raise DataError(
            f"label_noise must lie in [0, 1), got {label_noise}. It is the share of training "
            "labels that are made wrong."
        )
    if ood == name:
        raise DataError(f"ood must be of another kind than {name}, which is the data set itself.")
    # Equal seeds choose independently in each data set.
    subset_seed, noise_seed = named_seed(seed, name).spawn(2)

    images, labels, *test = (
        _embedded_digits()
        if name == "digits"
        else _read_four(name, _download(name) if data_dir is None else data_dir)
    )
    available = len(labels) if test else len(labels) - 1
    if train_size is None:
        train_size = available if test else DIGITS_TRAIN_SIZE
    if not NUM_CLASSES <= train_size <= available:
        raise DataError(
            f"train_size must be at least {NUM_CLASSES}, one for each class, and at most "
            f"{available} for {name}{'' if test else ', leaving one to test on'}, "
            f"got {train_size}."
        )

    chosen = stratified(np.random.default_rng(subset_seed), labels, train_size)
    test_images, test_labels = test or (images[~chosen], labels[~chosen])
    noise_rng = np.random.default_rng(noise_seed)
    white = 16 if name == "digits" else 255
    return Dataset(
        name=name,
        train_inputs=_flat(images[chosen], white),
        train_labels=noisy(noise_rng, labels[chosen], NUM_CLASSES, label_noise).astype(np.int32),
        test_inputs=_flat(test_images, white),
        test_labels=test_labels.astype(np.int32),
        num_classes=NUM_CLASSES,
        label_noise=label_noise,
        ood_name="shuffled pixels" if ood is None else ood,
        ood_inputs=(
            shuffled(_flat(test_images, white), seed)
            if ood is None
            else _other_images(ood, test_images.shape[1:], data_dir)
        ),
    )


def shuffled(inputs: np.ndarray, seed: int) -> np.ndarray:
    """The first inputs, at most `MAX_SHUFFLED`, with the features of each in random order."""
    first = inputs[:MAX_SHUFFLED]
    flat = first.reshape(len(first), -1)
    return generator(seed, "shuffled").permuted(flat, axis=1).reshape(first.shape)


def named_seed(seed: int, name: str) -> np.random.SeedSequence:
    """The child of a seed that belongs to a name: what has different names is independent.

    Raises:
        DataError: a negative seed.
    """
    if seed < 0:
        raise DataError(f"seed must not be negative, got {seed}; take 0 or more.")
    return np.random.SeedSequence(seed, spawn_key=tuple(name.encode()))


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers of a seed for one purpose."""
    return np.random.default_rng(named_seed(seed, name))


def _other_images(name: str, shape: tuple[int, ...], data_dir: Path | None) -> np.ndarray:
    """Test images of another data set."""
    if name not in OOD_DATASETS:
        raise DataError(f"ood must be one of {', '.join(OOD_DATASETS)}, got {name!r}.")
    if data_dir is not None:
        folder = data_dir / name
    elif name in MIRRORS:
        folder = _download(name)
    else:
        raise DataError(
            f"{name} cannot be downloaded; put its test images into a folder {name} of data_dir "
            "(--data-dir)."
        )
    file = FILES[2]
    path = next((p for p in (folder / file, folder / f"{file}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder} must hold the test images of {name}, {file} or {file}.gz.")
    images = _read_idx(path, 3)[:MAX_OOD_IMAGES]
    if images.shape[1:] != shape:
        raise DataError(
            f"ood must have images of shape {shape}, as the data set has, but those of {name} "
            f"have {images.shape[1:]}."
        )
    return _flat(images, 255)


def _embedded_digits() -> tuple[np.ndarray, ...]:
    # Imported here, as is pooch below: asking for one data set should not cost the others' tools.
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def _read_four(name: str, data_dir: Path) -> tuple[np.ndarray, ...]:
    """Train images, train labels, test images, test labels, checked to fit together."""
    paths = _locate(name, data_dir)
    arrays = [_read_idx(path, ndim) for path, ndim in zip(paths, (3, 1, 3, 1), strict=True)]
    for images, labels in ((0, 1), (2, 3)):
        count, found = len(arrays[images]), len(arrays[labels])
        if count != found:
            whose = paths[images].name
            raise _damaged(
                paths[labels], f"must hold a label for each image in {whose}: {count}, got {found}"
            )
        if (largest := arrays[labels].max()) >= NUM_CLASSES:
            raise _damaged(paths[labels], f"must hold labels in [0, {NUM_CLASSES}), got {largest}")
    train, test = arrays[0].shape[1:], arrays[2].shape[1:]
    if train != test:
        raise _damaged(
            paths[2], f"must hold images of shape {train}, as {paths[0].name} does, got {test}"
        )
    return tuple(arrays)


def _locate(name: str, data_dir: Path) -> list[Path]:
    """The paths of FILES, all in one folder: never one set's images with another's labels."""
    folders = (data_dir / name, data_dir)
    folder = next((folder for folder in folders if any(folder.glob("*-ubyte*"))), data_dir)
    paths = []
    for file in FILES:
        forms = (folder / file, folder / f"{file}.gz")
        path = next((path for path in forms if path.is_file()), None)
        if path is None:
            raise DataError(
                f"data_dir {data_dir} must hold the four files of {name}, in itself or in its "
                f"folder {name}, but {folder} holds no {file} or {file}.gz; put it there, or "
                "leave data_dir (--data-dir) out to download the files."
            )
        paths.append(path)
    return paths


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads unsigned bytes in IDX form: an array of `ndim` axes, uint8, read-only.

    Two zero bytes, the type (8: unsigned byte), the number of axes, the size of each axis as a
    big-endian uint32, and then the bytes, last axis fastest.
    """
    try:
        content = path.read_bytes()
        # Not by the name: browsers unpack downloads and keep it.
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    magic, start = bytes((0, 0, 8, ndim)), 4 + 4 * ndim
    if content[:4] != magic:
        got = content[:4].hex(" ") or "none"
        raise _damaged(path, f"must begin with the bytes {magic.hex(' ')}, got {got}")
    if len(content) < start:
        raise _damaged(path, f"must have a header of {start} bytes, got {len(content)} in all")
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    if not 0 < math.prod(shape) == len(content) - start:
        raise _damaged(
            path,
            f"must hold at least one byte, and as many as its shape {shape} announces "
            f"({math.prod(shape)}), got {len(content) - start}",
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}; put a sound copy in its place.")


def _download(name: str) -> Path:
    """The folder of the user's cache that holds the four files, downloaded if need be."""
    import pooch

    folder = Path(pooch.os_cache("jdrop")) / name
    for file, digest in zip(FILES, SHA256[name], strict=True):
        url = f"{MIRRORS[name]}{file}.gz"
        try:
            pooch.retrieve(url, known_hash=f"sha256:{digest}", fname=f"{file}.gz", path=folder)
        # Of an unreachable server, a refusal or a full disk, and of a wrong checksum.
        except (OSError, ValueError) as error:
            raise DataError(
                f"{url} could not be downloaded into {folder} ({error}); get the four files of "
                f"{name} by other means and name their folder with data_dir (--data-dir)."
            ) from error
    return folder


def stratified(rng: np.random.Generator, labels: np.ndarray, size: int) -> np.ndarray:
    """Chooses `size` examples, each class in proportion: a Boolean array, True = chosen.

    The k-th of the n examples of a class, in random order, stands at (k + 1/2) / n of a queue,
    and the first `size` of the queue are chosen (the method of Webster and Sainte-Laguë).
    """
    order = rng.permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    chosen = np.zeros(len(labels), bool)
    chosen[order[np.argsort(place[order], kind="stable")[:size]]] = True
    return chosen


def noisy(
    rng: np.random.Generator, labels: np.ndarray, num_classes: int, share: float
) -> np.ndarray:
    """Labels of which `round(share * len(labels))` are wrong."""
    # Drawn for all, used for some: so the wrong labels of a small share are among those of a large.
    wrong = (labels + rng.integers(1, num_classes, len(labels))) % num_classes
    flipped = rng.permutation(len(labels)) < round(share * len(labels))
    return np.where(flipped, wrong, labels)


def _flat(images: np.ndarray, white: int) -> np.ndarray:
    inputs = images.reshape(len(images), -1).astype(np.float32)
    inputs /= white
    return inputs
