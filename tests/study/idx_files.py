"""Made-up images in the files of MNIST's format."""

import gzip
import struct

import numpy as np

from jdrop.study.data import images


def write_images(folder, *, num_train=40, num_test=20):
    """Writes random images of 28x28 pixels with the ten labels in turn, gzipped."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    arrays = []
    for count in (num_train, num_test):
        arrays.append(rng.integers(0, 256, (count, *images.IMAGE_SHAPE), np.uint8))
        arrays.append(np.resize(np.arange(10, dtype=np.uint8), count))
    for name, array in zip(images.FILES, arrays, strict=True):
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
