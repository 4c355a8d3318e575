"""Digits, and images in MNIST's file format: read, downloaded, checked."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from jdrop.study.data.dataset import (
    DataError,
    Dataset,
    named_seed,
    noisy,
    shuffled,
    stratified,
)
from jdrop.study.data.groups import number_groups, read_groups, split_groups

DATASETS = ("digits", "mnist", "fashion-mnist")

NUM_CLASSES = 10  # Of every data set in DATASETS.

DIGITS_TRAIN_SIZE = 500  # Where train_size is None.

FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
"""Where each form begins in scikit-learn's digits.

These digits are the test set of UCI's optdigits, 13 writers who filled in forms. Who wrote which
digit was not published, but the order of the labels shows the forms. Every writer copied the same
130 digits: three times 0 to 9, then 0 9 5 5 6 5 0 ... 9 0 8 9 8. The labels repeat them 14 times.
Some scans are missing, and one label differs.
"""

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

IMAGE_SHAPE = (28, 28)  # Of the data sets in MIRRORS.

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
"""Checksums of the gzipped FILES, in their order, as published."""


OOD_DATASETS = ("mnist", "fashion-mnist", "notmnist")
"""Data sets whose test images can be the out-of-distribution inputs."""

MAX_OOD_IMAGES = 10_000


def load(
    name: str,
    *,
    train_size: int | None,
    label_noise: float,
    seed: int,
    data_dir: Path | None,
    ood: str | None = None,
    groups: Path | None = None,
) -> Dataset:
    """Loads a named data set with a subset of its training examples and with label noise.

    The training examples are a stratified subset: each class keeps its share of the whole. For
    one name and seed, a larger subset holds the smaller ones, and more noise keeps the labels that
    less noise makes wrong. Curves over either are therefore paired. The noise does not change the
    subset.

    Args:
        name: "digits" (1797 scans of 8x8, part of scikit-learn), "mnist" or "fashion-mnist"
            (60,000 + 10,000 images of 28x28).
        train_size: count of training examples, at least one for each class. None takes 500 of
            digits and all published training examples of the others. All other digits are test
            examples.
        label_noise: share of training labels, in [0, 1), that become wrong, uniformly among the
            other classes: exactly `round(label_noise * train_size)`.
        seed: at least 0; chooses the subset and the wrong labels.
        data_dir: folder of the four files in MNIST's format, gzipped or not. They lie in it or in
            its folder `name`. None downloads them once, into the user's cache. Not used for digits.
        ood: data set of `OOD_DATASETS` whose test images, at most 10,000, are the
            out-of-distribution inputs, from its folder in `data_dir`. None shuffles the pixels of
            at most 2000 test images, each in a different order.
        groups: file with the group of each example, see `jdrop.study.data.groups.read_groups`: of
            all published examples, first the training examples, or of the test examples alone.
            None takes the forms that the writers filled in for digits, and no groups for the
            others.

    Raises:
        DataError: an argument is out of range, a file is missing or damaged, files do not belong
            together, groups do not fit the examples, or a download failed.

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
        raise DataError(
            f"ood must be another data set than {name}, which the networks are trained on."
        )
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
    group_name, train_groups, test_groups, group_labels = _groups(
        name, groups, chosen, len(test_labels) if test else 0
    )
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
        group_name=group_name,
        train_groups=train_groups,
        test_groups=test_groups,
        group_labels=group_labels,
    )


def _other_images(name: str, shape: tuple[int, ...], data_dir: Path | None) -> np.ndarray:
    """Reads the test images of another data set."""
    if name not in OOD_DATASETS:
        raise DataError(f"ood must be one of {', '.join(OOD_DATASETS)}, got {name!r}.")
    if data_dir is not None:
        folder = data_dir / name
    elif name in MIRRORS:
        _require_shape(name, IMAGE_SHAPE, shape)  # Before the download.
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
    _require_shape(name, images.shape[1:], shape)
    return _flat(images, 255)


def _require_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise DataError(
            f"ood must have images of shape {wanted}, as the data set has, but those of {name} "
            f"have {shape}."
        )


def _embedded_digits() -> tuple[np.ndarray, ...]:
    # Imported here, as pooch is below: importing them takes longer than loading other data sets.
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def _groups(
    name: str, path: Path | None, chosen: np.ndarray, num_given_test: int
) -> tuple[str | None, np.ndarray | None, np.ndarray | None, tuple[str, ...] | None]:
    """What a group is, the groups of the training and the test examples, and their labels."""
    if path is not None:
        group_name, groups = "group", read_groups(path)
    elif name == "digits":
        group_name = "writer's form"
        groups = np.searchsorted(FORM_STARTS, np.arange(len(chosen)), side="right")
        if len(np.unique(groups[~chosen])) < 2:
            return None, None, None, None
    else:
        return None, None, None, None
    parts = split_groups(f"groups (--groups) of {name}", groups, chosen, num_given_test)
    return group_name, *number_groups(*parts)


def _read_four(name: str, data_dir: Path) -> tuple[np.ndarray, ...]:
    """Reads train images, train labels, test images, test labels; raises if they do not fit."""
    paths = _locate(name, data_dir)
    arrays = [_read_idx(path, ndim) for path, ndim in zip(paths, (3, 1, 3, 1), strict=True)]
    for images, labels in ((0, 1), (2, 3)):
        num_images, num_labels = len(arrays[images]), len(arrays[labels])
        if num_images != num_labels:
            whose = paths[images].name
            raise _damaged(
                paths[labels],
                f"must hold a label for each image in {whose}: {num_images}, got {num_labels}",
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
    """The paths of FILES, all in one folder, so that images never meet another set's labels."""
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
        # The name does not tell: browsers unpack downloads and keep the name.
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
    """Downloads the four files once, into the user's cache; returns their folder."""
    import pooch

    folder = Path(pooch.os_cache("jdrop")) / name
    for file, digest in zip(FILES, SHA256[name], strict=True):
        url = f"{MIRRORS[name]}{file}.gz"
        try:
            pooch.retrieve(url, known_hash=f"sha256:{digest}", fname=f"{file}.gz", path=folder)
        # OSError: no server, a refusal, a full disk. ValueError: a wrong checksum.
        except (OSError, ValueError) as error:
            raise DataError(
                f"{url} could not be downloaded into {folder} ({error}); get the four files of "
                f"{name} by other means and name their folder with data_dir (--data-dir)."
            ) from error
    return folder


def _flat(images: np.ndarray, white: int) -> np.ndarray:
    inputs = images.reshape(len(images), -1).astype(np.float32)
    inputs /= white
    return inputs
