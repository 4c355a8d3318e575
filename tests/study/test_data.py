import gzip
import hashlib
import http.server
import socket
import struct
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pooch
import pytest
from sklearn.datasets import load_digits

from jdrop.study.data import DATASETS, DataError, dataset, generator, images, load, shuffled

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = images.FILES


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def raw_arrays(seed=0, train=60, test=20, size=(4, 3)):
    rng = np.random.default_rng(seed)
    return {
        IMAGES: rng.integers(0, 256, (train, *size), np.uint8),
        LABELS: np.resize(np.arange(10, dtype=np.uint8), train),
        TEST_IMAGES: rng.integers(0, 256, (test, *size), np.uint8),
        TEST_LABELS: np.resize(np.arange(10, dtype=np.uint8), test),
    }


def write(folder, arrays, *, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        content = idx(array)
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)


def from_folder(folder, name="mnist", *, train_size=None, label_noise=0.0, seed=0):
    return load(name, train_size=train_size, label_noise=label_noise, seed=seed, data_dir=folder)


def digits(train_size=100, label_noise=0.0, seed=0):
    return from_folder(None, "digits", train_size=train_size, label_noise=label_noise, seed=seed)


def rows(inputs):
    """The examples as a set; two digits never share all their pixels."""
    return {row.tobytes() for row in inputs}


# Which examples are chosen.


def test_digits_are_all_there_once_with_their_own_labels():
    published = load_digits()
    label_of = {
        row.tobytes(): label
        for row, label in zip(
            (published.data / 16).astype(np.float32), published.target, strict=True
        )
    }
    chosen = digits(train_size=None)
    assert chosen.name == "digits"
    assert chosen.num_classes == 10
    assert chosen.train_inputs.shape == (500, 64)
    assert chosen.test_inputs.shape == (1297, 64)
    assert rows(chosen.train_inputs) | rows(chosen.test_inputs) == set(label_of)
    for inputs, labels in (
        (chosen.train_inputs, chosen.train_labels),
        (chosen.test_inputs, chosen.test_labels),
    ):
        assert (inputs.dtype, labels.dtype) == (np.float32, np.int32)
        assert [label_of[row.tobytes()] for row in inputs] == labels.tolist()
        assert inputs.min() == 0
        assert inputs.max() == 1


@pytest.mark.parametrize("train_size", [10, 137, 500, 1000])
def test_each_class_has_its_share_to_within_one_example(train_size):
    share = np.bincount(load_digits().target) / 1797
    counts = np.bincount(digits(train_size).train_labels, minlength=10)
    assert counts.sum() == train_size
    assert np.all(np.abs(counts - train_size * share) < 1), counts


def test_unequal_classes_keep_their_share(tmp_path):
    arrays = raw_arrays(train=100)
    arrays[LABELS][:] = np.repeat(np.arange(10), [1, 3, 6, 10, 10, 10, 10, 10, 10, 30])
    write(tmp_path, arrays)
    counts = np.bincount(from_folder(tmp_path, train_size=50).train_labels, minlength=10)
    assert np.all(np.abs(counts - np.bincount(arrays[LABELS]) / 2) <= 0.5), counts


def test_the_subset_follows_from_the_seed_alone():
    first, again, other = digits(seed=3), digits(seed=3), digits(seed=4)
    np.testing.assert_array_equal(first.train_inputs, again.train_inputs)
    np.testing.assert_array_equal(first.test_inputs, again.test_inputs)
    assert rows(first.train_inputs) != rows(other.train_inputs)


def test_a_larger_subset_holds_the_smaller_one():
    assert rows(digits(50).train_inputs) < rows(digits(51).train_inputs)
    assert rows(digits(51).train_inputs) < rows(digits(700).train_inputs)


def test_data_sets_choose_independently(tmp_path):
    write(tmp_path, raw_arrays())
    mnist, fashion = (from_folder(tmp_path, name, train_size=30) for name in DATASETS[1:])
    assert rows(mnist.train_inputs) != rows(fashion.train_inputs)


# Label noise.


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.004, 0), (0.2, 20), (0.996, 100)])
def test_exactly_the_share_of_train_labels_is_wrong(share, count):
    clean, noisy = digits(), digits(label_noise=share)
    np.testing.assert_array_equal(noisy.train_inputs, clean.train_inputs)
    np.testing.assert_array_equal(noisy.test_labels, clean.test_labels)
    np.testing.assert_array_equal(noisy.test_inputs, clean.test_inputs)
    assert np.sum(noisy.train_labels != clean.train_labels) == count
    assert noisy.label_noise == share
    assert noisy.train_labels.dtype == np.int32
    assert set(noisy.train_labels.tolist()) <= set(range(10))


def test_wrong_labels_are_uniform_among_the_other_classes():
    clean, noisy = digits(1796), digits(1796, label_noise=0.9)
    steps = (noisy.train_labels - clean.train_labels) % 10
    counts = np.bincount(steps, minlength=10)[1:]
    expected = counts.sum() / 9
    assert counts.sum() == round(0.9 * 1796)
    # Five standard deviations of a binomial count.
    bound = 5 * np.sqrt(expected * (1 - 1 / 9))
    assert np.all(np.abs(counts - expected) < bound), counts


def test_more_noise_keeps_the_wrong_labels_of_less():
    clean, some, more = (digits(label_noise=share).train_labels for share in (0.0, 0.1, 0.5))
    wrong = some != clean
    np.testing.assert_array_equal(more[wrong], some[wrong])


def test_noise_follows_from_the_seed_and_is_spread_over_the_set():
    clean, noisy, again = digits(), digits(label_noise=0.3), digits(label_noise=0.3)
    np.testing.assert_array_equal(noisy.train_labels, again.train_labels)
    wrong = np.flatnonzero(noisy.train_labels != clean.train_labels)
    assert wrong.min() < 50 <= wrong.max()


# Files.


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("subfolder", ["", "fashion-mnist"])
def test_files_are_read_gzipped_or_plain_from_data_dir_or_its_folder(tmp_path, compress, subfolder):
    arrays = raw_arrays()
    write(tmp_path / subfolder, arrays, compress=compress)
    read = from_folder(tmp_path, "fashion-mnist")
    for inputs, name in ((read.train_inputs, IMAGES), (read.test_inputs, TEST_IMAGES)):
        assert inputs.dtype == np.float32
        expected = arrays[name].reshape(len(inputs), 12) / 255
        np.testing.assert_allclose(inputs, expected, rtol=1e-6)
    np.testing.assert_array_equal(read.train_labels, arrays[LABELS])
    np.testing.assert_array_equal(read.test_labels, arrays[TEST_LABELS])


def test_unpacked_files_that_kept_the_name_gz_are_read(tmp_path):
    for name, array in raw_arrays().items():
        (tmp_path / f"{name}.gz").write_bytes(idx(array))
    assert from_folder(tmp_path).train_inputs.shape == (60, 12)


def test_gzipped_files_without_the_name_gz_are_read(tmp_path):
    for name, array in raw_arrays().items():
        (tmp_path / name).write_bytes(gzip.compress(idx(array)))
    assert from_folder(tmp_path).train_inputs.shape == (60, 12)


def test_an_empty_folder_of_the_name_does_not_hide_the_files(tmp_path):
    write(tmp_path, raw_arrays())
    (tmp_path / "mnist").mkdir()
    assert from_folder(tmp_path).train_inputs.shape == (60, 12)


def test_a_subset_of_files_leaves_their_test_set_whole(tmp_path):
    arrays = raw_arrays()
    write(tmp_path, arrays)
    whole, part = from_folder(tmp_path), from_folder(tmp_path, train_size=20)
    assert part.train_inputs.shape == (20, 12)
    assert rows(part.train_inputs) < rows(whole.train_inputs)
    np.testing.assert_array_equal(part.test_inputs, whole.test_inputs)
    np.testing.assert_array_equal(part.test_labels, whole.test_labels)


def test_files_in_the_folder_of_the_name_go_before_files_in_data_dir(tmp_path):
    write(tmp_path, raw_arrays(train=60))
    write(tmp_path / "fashion-mnist", raw_arrays(train=70))
    assert len(from_folder(tmp_path, "mnist").train_labels) == 60
    assert len(from_folder(tmp_path, "fashion-mnist").train_labels) == 70


def test_files_of_two_folders_are_never_mixed(tmp_path):
    write(tmp_path, raw_arrays())
    write(tmp_path / "mnist", raw_arrays(seed=1))
    (tmp_path / "mnist" / LABELS).unlink()
    with pytest.raises(DataError, match=LABELS):
        from_folder(tmp_path)


def test_a_missing_file_is_named_with_its_folder_and_the_way_out(tmp_path):
    write(tmp_path, raw_arrays())
    (tmp_path / TEST_LABELS).unlink()
    with pytest.raises(DataError) as raised:
        from_folder(tmp_path)
    for part in (str(tmp_path), TEST_LABELS, "mnist", "--data-dir"):
        assert part in str(raised.value)


def test_a_data_dir_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="absent"):
        from_folder(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        from_folder(tmp_path / "file")


WHOLE = idx(raw_arrays()[IMAGES])

DAMAGE = {
    "empty": (b"", "00 00 08 03, got none"),
    "web page": (b"<!DOCTYPE html>", "00 00 08 03, got 3c 21 44 4f"),
    "float32": (WHOLE[:2] + b"\x0d" + WHOLE[3:], "got 00 00 0d 03"),
    "labels": (idx(raw_arrays()[LABELS]), "00 00 08 03, got 00 00 08 01"),
    "header cut": (WHOLE[:9], "a header of 16 bytes, got 9 in all"),
    "cut": (WHOLE[:-1], r"\(60, 4, 3\) announces \(720\), got 719"),
    "longer": (WHOLE + b"\0", r"\(60, 4, 3\) announces \(720\), got 721"),
    "no images": (idx(np.zeros((0, 4, 3), np.uint8)), "at least one byte"),
    "huge": (WHOLE[:4] + b"\xff" * 12 + WHOLE[16:], "got 720"),
    "gzip cut": (gzip.compress(WHOLE)[:-9], "cannot be read"),
    "gzip header only": (b"\x1f\x8b", "cannot be read"),
    "gzip body": (gzip.compress(WHOLE)[:10] + b"\xff" * 50, "cannot be read"),
    "gzip checksum": (gzip.compress(WHOLE)[:-8] + b"\1" * 8, "cannot be read"),
    "gzip and more": (gzip.compress(WHOLE) + b"more", "cannot be read"),
    "gzip of nothing": (gzip.compress(b""), "got none"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [IMAGES, TEST_IMAGES])
def test_damaged_files_are_named_with_what_is_wrong(tmp_path, damage, name):
    content, message = DAMAGE[damage]
    write(tmp_path, raw_arrays(), compress=True)
    (tmp_path / f"{name}.gz").write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}\.gz .*{message}.*put a sound copy"):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (LABELS, np.zeros(59, np.uint8), f"each image in {IMAGES}: 60, got 59"),
        (TEST_LABELS, np.zeros(21, np.uint8), f"each image in {TEST_IMAGES}: 20, got 21"),
        (LABELS, np.full(60, 10, np.uint8), r"labels in \[0, 10\), got 10"),
        (TEST_LABELS, np.full(20, 255, np.uint8), r"labels in \[0, 10\), got 255"),
        (TEST_IMAGES, np.zeros((20, 3, 4), np.uint8), r"shape \(4, 3\).*got \(3, 4\)"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, name, array, message):
    write(tmp_path, {**raw_arrays(), name: array})
    with pytest.raises(DataError, match=f"{name} .*{message}"):
        from_folder(tmp_path)


# Out-of-distribution inputs.


def with_ood(folder, ood, name="mnist", seed=0):
    return load(name, train_size=None, label_noise=0.0, seed=seed, data_dir=folder, ood=ood)


def test_shuffled_pixels_are_those_of_the_test_images(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_SHUFFLED", 15)
    write(tmp_path, raw_arrays())
    read = with_ood(tmp_path, None)
    assert read.ood_name == "shuffled pixels"
    assert (read.ood_inputs.shape, read.ood_inputs.dtype) == ((15, 12), np.float32)
    np.testing.assert_array_equal(np.sort(read.ood_inputs, 1), np.sort(read.test_inputs[:15], 1))
    np.testing.assert_array_equal(read.ood_inputs, with_ood(tmp_path, None).ood_inputs)
    assert not np.array_equal(read.ood_inputs, with_ood(tmp_path, None, seed=1).ood_inputs)
    # Each in a different order: two rows of the same pixels come out different.
    same = shuffled(np.tile(np.arange(12.0, dtype=np.float32).reshape(3, 4), (8, 1, 1)), 0)
    assert same.shape == (8, 3, 4)
    assert len(rows(same)) == 8


@pytest.mark.parametrize("compress", [False, True])
def test_out_of_distribution_images_are_read_from_their_folder(tmp_path, monkeypatch, compress):
    monkeypatch.setattr(images, "MAX_OOD_IMAGES", 18)
    write(tmp_path / "mnist", raw_arrays())
    other = raw_arrays(seed=1)[TEST_IMAGES]
    write(tmp_path / "notmnist", {TEST_IMAGES: other}, compress=compress)
    read = with_ood(tmp_path, "notmnist")
    assert read.ood_name == "notmnist"
    assert read.ood_inputs.dtype == np.float32
    np.testing.assert_allclose(read.ood_inputs, other[:18].reshape(18, 12) / 255, rtol=1e-6)
    np.testing.assert_array_equal(read.test_inputs, with_ood(tmp_path, None).test_inputs)


def test_out_of_distribution_images_that_are_missing_or_do_not_fit_are_refused(tmp_path):
    write(tmp_path / "mnist", raw_arrays())
    write(tmp_path / "notmnist", {TEST_IMAGES: np.zeros((5, 3, 4), np.uint8)})
    for ood, message in (
        ("cifar", "ood must be one of mnist, fashion-mnist, notmnist, got 'cifar'"),
        ("mnist", "ood must be another data set than mnist"),
        ("fashion-mnist", rf"fashion-mnist must hold the test images .*{TEST_IMAGES}\.gz"),
        ("notmnist", r"images of shape \(4, 3\).*those of notmnist have \(3, 4\)"),
    ):
        with pytest.raises(DataError, match=message):
            with_ood(tmp_path, ood)
    with pytest.raises(DataError, match=r"notmnist cannot be downloaded; put .*--data-dir"):
        with_ood(None, "notmnist", name="digits")


def test_images_of_another_shape_are_refused_before_they_are_downloaded(monkeypatch):
    monkeypatch.setattr(images, "_download", lambda name: pytest.fail("downloads"))
    with pytest.raises(DataError, match=r"images of shape \(8, 8\).* mnist have \(28, 28\)"):
        with_ood(None, "mnist", name="digits")


def test_generators_of_different_names_and_seeds_differ():
    draws = {generator(seed, name).bytes(8) for seed in (0, 1) for name in ("a", "b")}
    assert len(draws) == 4
    assert generator(1, "a").bytes(8) in draws
    with pytest.raises(DataError, match="seed must not be negative, got -1"):
        generator(-1, "a")


# Arguments.


@pytest.mark.parametrize("train_size", [-1, 0, 9, 1797, 1798])
def test_train_sizes_outside_those_of_digits_are_refused(train_size):
    with pytest.raises(DataError, match=rf"at least 10.*at most 1796.*got {train_size}\."):
        digits(train_size)


def test_all_digits_but_one_can_be_trained_on():
    assert len(digits(1796).test_labels) == 1


def test_train_sizes_above_those_of_the_files_are_refused(tmp_path):
    write(tmp_path, raw_arrays())
    assert len(from_folder(tmp_path, train_size=60).train_labels) == 60
    with pytest.raises(DataError, match=r"at most 60 for mnist, got 61\."):
        from_folder(tmp_path, train_size=61)


@pytest.mark.parametrize("label_noise", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_label_noise_out_of_range_is_refused(label_noise):
    with pytest.raises(DataError, match=rf"label_noise must lie in \[0, 1\), got {label_noise}\."):
        digits(label_noise=label_noise)


def test_unknown_names_and_negative_seeds_are_refused():
    with pytest.raises(DataError, match="one of digits, mnist, fashion-mnist, got 'cifar'"):
        from_folder(None, "cifar")
    with pytest.raises(DataError, match="seed must not be negative, got -1"):
        digits(seed=-1)


# Downloads, from a server on this machine.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path / "cache" / "jdrop"


@pytest.fixture
def mirror(tmp_path, monkeypatch, cache):
    """The folder that a server offers as MNIST, and the list of what was asked for."""
    folder = tmp_path / "mirror"
    write(folder, raw_arrays(), compress=True)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.path)

    digests = (hashlib.sha256((folder / f"{name}.gz").read_bytes()) for name in images.FILES)
    monkeypatch.setitem(images.SHA256, "mnist", tuple(digest.hexdigest() for digest in digests))
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setitem(images.MIRRORS, "mnist", f"http://127.0.0.1:{server.server_port}/")
        yield folder, requests
        server.shutdown()
        thread.join()


def test_files_are_downloaded_once(mirror, cache):
    folder, requests = mirror
    downloaded = from_folder(None)
    np.testing.assert_array_equal(downloaded.train_inputs, from_folder(folder).train_inputs)
    assert sorted(path.name for path in (cache / "mnist").iterdir()) == sorted(
        f"{name}.gz" for name in images.FILES
    )
    assert len(requests) == 4
    from_folder(None)
    assert len(requests) == 4


def test_a_damaged_file_in_the_cache_is_downloaded_again(mirror, cache):
    _, requests = mirror
    from_folder(None)
    (cache / "mnist" / f"{LABELS}.gz").write_bytes(b"damaged")
    assert from_folder(None).train_labels.shape == (60,)
    assert requests[4:] == [f"/{LABELS}.gz"]


def test_a_download_with_a_wrong_checksum_is_refused(mirror, cache):
    folder, _ = mirror
    (folder / f"{LABELS}.gz").write_bytes(gzip.compress(idx(np.zeros(60, np.uint8))))
    with pytest.raises(DataError, match=rf"{LABELS}\.gz could not be .*hash.*--data-dir"):
        from_folder(None)
    assert not (cache / "mnist" / f"{LABELS}.gz").exists()


def test_a_file_that_the_server_lacks_is_named(mirror):
    folder, _ = mirror
    (folder / f"{TEST_IMAGES}.gz").unlink()
    with pytest.raises(DataError, match=rf"{TEST_IMAGES}\.gz could not be .*404.*--data-dir"):
        from_folder(None)


def test_a_server_that_cannot_be_reached_is_named(monkeypatch, cache):
    with socket.socket() as bound:
        # Bound but not listening: nothing answers there, and nobody else can take the port.
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        monkeypatch.setitem(images.MIRRORS, "fashion-mnist", address)
        with pytest.raises(DataError) as raised:
            from_folder(None, "fashion-mnist")
    for part in (f"{address}{IMAGES}.gz", "refused", "--data-dir", "fashion-mnist"):
        assert part in str(raised.value)


def test_checksums_are_four_different_ones_for_each_published_set():
    assert set(images.SHA256) == set(images.MIRRORS) == set(DATASETS) - {"digits"}
    digests = [digest for name in images.SHA256 for digest in images.SHA256[name]]
    assert len(set(digests)) == 8
    assert {len(bytes.fromhex(digest)) for digest in digests} == {32}


def test_importing_the_data_imports_neither_sklearn_nor_pooch_nor_pandas():
    program = (
        "import sys, jdrop.study.data\n"
        "names = ('sklearn', 'pooch', 'requests', 'pandas')\n"
        "print([name for name in names if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
