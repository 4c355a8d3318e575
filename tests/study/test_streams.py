"""Data larger than memory: read from sources as needed, with the results of data in memory."""

import threading

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdrop
import jdrop.linen
from jdrop import thinned
from jdrop.study import checkpoints, streaming
from jdrop.study.data import (
    DataError,
    Dataset,
    Stream,
    chunks,
    fingerprint,
    from_arrays,
    join,
    labels_of_tokens,
    num_examples,
    shapes_of,
    streams,
    take,
)
from jdrop.study.data.inputs import checked_inputs, is_source
from jdrop.study.models import MLP, Model
from jdrop.study.predictor import Predictor
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings
from jdrop.study.training import NetworkSpec, Trainer
from jdrop.study.training_losses import mean_losses

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype(np.float32)
Y = np.arange(60) % 3
TREE = {"a": X[:, :1], "b": X[:, 1:]}
TRAIN, TEST = slice(40), slice(40, 60)


class Records:
    """The least that a source must have."""

    def __init__(self, inputs):
        self.inputs, self.threads = inputs, set()

    def __len__(self):
        return num_examples(self.inputs)

    def __getitem__(self, index):
        assert type(index) is int
        self.threads.add(threading.current_thread())
        return take(self.inputs, index)


class StoredInChunks(Records):
    """As arrays of HDF5 and Zarr are: NumPy could read all of it, which must not happen."""

    chunks = (7, 4)
    dtype = np.dtype(np.float32)
    shape = X.shape

    def __array__(self, dtype=None, copy=None):
        raise AssertionError


def memmap(folder, inputs):
    """Files of the arrays, mapped into memory."""
    paths = iter(range(100))

    def write(array):
        path = folder / f"{next(paths)}.npy"
        np.save(path, array)
        return np.load(path, mmap_mode="r")

    folder.mkdir(parents=True, exist_ok=True)
    return jax.tree.map(write, inputs)


def load_with_grain(folder, inputs):
    return grain.MapDataset.source(Records(inputs)).map(lambda example: example)


SOURCES = {
    "memmap": memmap,
    "records": lambda folder, inputs: Records(inputs),
    "grain": load_with_grain,
}


@pytest.fixture
def stream_all(monkeypatch):
    """No inputs are small enough for the memory, and 14 rows of `X` are a chunk."""
    monkeypatch.setattr(streams, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 14 * 16)


@pytest.mark.parametrize("inputs", [X, TREE, X > 0, (X * 9).astype(np.int64)], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_a_source_is_read_as_an_array_is(tmp_path, stream_all, source, inputs):
    in_memory = from_arrays("a", take(inputs, TRAIN), Y[TRAIN], take(inputs, TEST), Y[TEST])
    make = SOURCES[source]
    train = make(tmp_path / "train", take(inputs, TRAIN))
    test = make(tmp_path / "test", take(inputs, TEST))
    calls = []
    data = from_arrays(
        "a", train, Y[TRAIN], test, Y[TEST], progress=lambda *call: calls.append(call)
    )
    assert isinstance(data.train_inputs, Stream)
    assert isinstance(data.test_inputs, Stream)
    assert shapes_of(data.train_inputs) == shapes_of(in_memory.train_inputs)
    assert ("checking inputs", 3, 3) in calls or len(chunks(data.train_inputs)) != 3
    assert fingerprint(data) == fingerprint(in_memory)
    chosen = np.array([30, 3, 3, 12, 7])
    pairs = [
        (data.train_inputs, in_memory.train_inputs),
        (data.train_on(chosen).train_inputs, in_memory.train_on(chosen).train_inputs),
        (
            data.train_on(Y[TRAIN] == 1).train_on(np.arange(5)).train_inputs,
            in_memory.train_on(Y[TRAIN] == 1).train_on(np.arange(5)).train_inputs,
        ),
        (
            join(data.train_inputs, data.test_inputs),
            join(in_memory.train_inputs, in_memory.test_inputs),
        ),
    ]
    for streamed, expected in pairs:
        assert isinstance(streamed, Stream)
        assert shapes_of(streamed) == shapes_of(expected)
        some = np.random.default_rng(0).permutation(num_examples(expected))
        for rows in (slice(None), slice(1), slice(2, 4), some):
            read, wanted = take(streamed, rows), take(expected, rows)
            jax.tree.map(np.testing.assert_array_equal, read, wanted)
            assert shapes_of(read) == shapes_of(wanted)


def test_small_sources_and_sources_in_a_pytree_come_into_memory(tmp_path):
    mixed = {"a": memmap(tmp_path, TREE["a"]), "b": Records(TREE["b"])}
    for inputs in (mixed, Records(TREE), grain.MapDataset.source(Records(TREE))):
        checked = checked_inputs("inputs", inputs)
        jax.tree.map(np.testing.assert_array_equal, checked, TREE)
        assert all(type(array) is np.ndarray for array in checked.values())
    pair = checked_inputs("inputs", (Records(TREE["a"]), TREE["b"]))
    jax.tree.map(np.testing.assert_array_equal, pair, (TREE["a"], TREE["b"]))


def test_an_array_that_is_stored_in_chunks_is_a_source(stream_all):
    assert is_source(StoredInChunks(X))
    streamed = checked_inputs("inputs", StoredInChunks(X))
    np.testing.assert_array_equal(take(streamed, slice(5)), X[:5])
    assert not any(map(is_source, (X, X.tolist(), jnp.asarray(X), "text", {"a": X}, 3.0)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            Records(np.where(np.arange(60)[:, None] == 50, np.nan, X)),
            r"inputs\[48:60\] must be finite, but 4 of 48 values are not, the first at \(2, 0\)",
        ),
        (Records(X[:, 0]), r"inputs must be \[example, feature, ...\]"),
        (Records({"a": X.astype(str)}), r"inputs\['a'\] must be numbers"),
        (Records(X[:50]), "must hold one number for each of the 50 inputs"),
        ({"a": Records(X), "b": X[:50]}, "must have the same number of examples.*60, 50"),
        (
            {"a": Records(X), "b": 3.0},
            "must have the same number of examples, at least 1, got 60, 0",
        ),
        (range(0), "must have the same number of examples, at least 1"),
        (
            grain.MapDataset.source([*X[:30], *X[:30, :2]]),
            r"all examples of inputs\[24:36\] must have the same structure and shapes",
        ),
    ],
)
def test_sources_that_do_not_fit_are_refused(stream_all, inputs, message):
    with pytest.raises(DataError, match=message):
        from_arrays("a", inputs, Y, X, Y)


def test_examples_of_another_dtype_are_refused(stream_all):
    ids = np.ones((30, 4), int)
    with pytest.raises(DataError, match=r"all examples must be as the first one is"):
        checked_inputs("inputs", grain.MapDataset.source([*ids, *X[:30]]))


SETTINGS = Settings(replicates=2, batch_size=8, epochs=3)
MODEL = Model(lambda: MLP((6,), 3))


def train(folder, inputs, network=MODEL.dropout, labels=Y[TRAIN], record=True):
    data = Dataset("a", inputs, np.int32(labels), X[TEST], np.int32(Y[TEST]), 3)
    spec = NetworkSpec(network, 2, 3, optax.adam(0.01), record=record)
    return Trainer(RunFolder(folder, {}), SETTINGS, lambda *call: None).fit_networks(
        jax.random.key(0), spec, data, checkpoint="a", description="networks"
    )


@pytest.mark.parametrize("thins", [False, True])
def test_streamed_training_equals_training_on_data_in_memory(tmp_path, monkeypatch, thins):
    """With the same orders, masks and, of thinned networks, the same units in every epoch."""
    network = MODEL.dropout
    if thins:
        network = thinned.thin(network, X[:1], block_size=2)
    in_memory = train(tmp_path / "memory", X[TRAIN], network)
    monkeypatch.setattr(streams, "MEMORY_SHARE", 0.0)
    source = Records(X[TRAIN])
    streamed = train(tmp_path / "stream", checked_inputs("inputs", source), network)
    for one, other in zip(
        jax.tree.leaves(streamed.variables), jax.tree.leaves(in_memory.variables), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    curves = streamed.log.learning_curve, in_memory.log.learning_curve
    for split in ("train", "test"):
        one, other = (getattr(curve, split) for curve in curves)
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-5)
    assert streamed.epoch_flops == in_memory.epoch_flops
    assert threading.main_thread() in source.threads
    assert len(source.threads) > 1  # Batches are read by others.


@pytest.mark.slow
def test_a_small_part_of_a_stream_is_read_into_memory(tmp_path, monkeypatch):
    # 50 examples fit into the memory, and all 60 do not.
    monkeypatch.setattr(streams, "MEMORY_SHARE", X[:50].nbytes / streams.machine_memory())
    part = streams.select(checked_inputs("inputs", Records(X)), np.arange(40))
    assert isinstance(part, Stream)
    of_part, of_array = (
        train(tmp_path / name, inputs) for name, inputs in (("part", part), ("array", X[TRAIN]))
    )
    jax.tree.map(np.testing.assert_array_equal, of_part.variables, of_array.variables)


@pytest.mark.slow
def test_the_device_never_holds_all_training_inputs(tmp_path, monkeypatch):
    many = np.resize(X, (400, 20))
    largest, batches = [], []
    of_other_tests = {id(array) for array in jax.live_arrays()}

    class Watching(Records):
        def __getitem__(self, index):
            arrays = [array for array in jax.live_arrays() if id(array) not in of_other_tests]
            largest.append(max((array.nbytes for array in arrays), default=0))
            batches.append(sum(array.shape == (4, 8, 20) for array in arrays))
            return super().__getitem__(index)

    monkeypatch.setattr(streams, "MEMORY_SHARE", 0.0)
    inputs = checked_inputs("inputs", Watching(many))
    largest.clear()
    train(tmp_path, inputs, labels=np.resize(Y, 400), record=False)
    # The rows of the four networks are there, `[network, example]`.
    assert max(largest) == 4 * 400 * 4 < many.nbytes / 4
    assert 1 <= max(batches) <= 2 * streaming.READ_AHEAD + 2


def test_a_reader_reads_ahead_in_order_and_not_further():
    read, taken = [], []
    for item in streaming.read_ahead(lambda item: read.append(item) or item, range(20)):
        taken.append(item)
        assert len(read) <= len(taken) + streaming.READ_AHEAD
    assert taken == read == [*range(20)]


def test_errors_of_a_source_end_the_training():
    def read(item):
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        next(streaming.read_ahead(read, range(3)))


def init_members(network, inputs, count):
    keys = jax.random.split(jax.random.key(0), count)
    return jax.vmap(lambda key: network.init(key, jnp.asarray(inputs[:1])))(keys)


@pytest.mark.slow
def test_scores_and_predictions_of_chunks_are_those_of_the_whole(monkeypatch):
    network = MODEL.dropout
    variables = init_members(network, X, 4)
    data = from_arrays("a", X[TRAIN], Y[TRAIN], X[TEST], Y[TEST])
    predictor = Predictor(SETTINGS, data, lambda *call: None)

    def all_results():
        key = jax.random.key(1)
        return (
            mean_losses(network, variables, X, np.int32(Y), data.output_bytes),
            predictor.predict(None, network, variables, X, Y),
            predictor.read(None, network, variables, epochs=1, weight_decay=None).ood_outputs,
            predictor.predict(key, network, variables, X, Y),
        )

    *whole, masked = all_results()
    monkeypatch.setattr(streams, "CHUNK_BYTES", 14 * 28)
    *in_chunks, masked_chunks = all_results()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), in_chunks, whole)
    # Every chunk has masks of its own.
    assert masked_chunks.shape == masked.shape
    assert not np.allclose(masked_chunks, masked)


def test_the_scores_of_tokens_are_means_over_all_chunks(monkeypatch):
    ids, labels = np.int32(X > 0), np.where(X > 0.5, 1, np.where(X > -0.5, 0, -1)).astype(np.int32)
    labels[:14] = -1  # A chunk without a label.
    network = jdrop.linen.as_network(nn.Embed(2, 2), has_dropout=False)
    variables = init_members(network, ids, 2)
    whole = mean_losses(network, variables, ids, labels, 32)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 14 * 48)
    assert mean_losses(network, variables, ids, labels, 32) == pytest.approx(whole, rel=1e-5)
    assert len(labels_of_tokens(labels)) < labels[14:].size


class Net(nn.Module):
    rate: float = 0.3

    @nn.compact
    def __call__(self, x, train):
        x = jdrop.linen.Dropout(self.rate)(nn.relu(nn.Dense(6)(x)), deterministic=not train)
        return nn.Dense(3)(x)


class KilledError(Exception):
    pass


@pytest.mark.slow
def test_a_comparison_of_sources_is_that_of_arrays_and_goes_on(tmp_path, monkeypatch):
    """Scores, tuning, sweep, linear model and theory, of a run that is killed on the way."""
    monkeypatch.setattr(streams, "CHUNK_BYTES", 14 * 28)
    monkeypatch.setattr(checkpoints, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    settings = dict(replicates=2, ensemble_size=2, budget=2, num_samples=2, epochs=2)
    settings |= dict(batch_size=8, controls=False, sweep={"train_size": [20]})

    def run(folder, train, test, progress=False):
        arrays = (train, Y[TRAIN], test, Y[TEST])
        out = tmp_path / folder
        return jdrop.compare(Net(), *arrays, out=out, progress=progress, **settings)

    def results(comparison):
        return {
            "scores": {
                f"{method.name} {point.size}": {s: i.mean for s, i in point.scores.items()}
                for method in comparison.methods
                for point in method.points
            },
            "worth": [point.worth["nll"].largest for point in comparison.method("dropout").points],
            "sweep": comparison.sweep[0].scores["dropout"]["nll"].mean,
            "overfitting": [each.gap["nll"].mean for each in comparison.overfitting],
            "deletion": comparison.co_adaptation["dropout"].deletion["nll"],
            "left out": len(comparison.left_out),
        }

    expected = results(run("arrays", X[TRAIN], X[TEST]))
    assert len(expected["scores"]) > 5
    monkeypatch.setattr(streams, "MEMORY_SHARE", 0.0)
    sources = memmap(tmp_path, X[TRAIN]), load_with_grain(tmp_path, X[TEST])

    def kill(what, done, total):
        if what == "training dropout networks" and done == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run("sources", *sources, kill)
    assert [*(tmp_path / "sources" / "checkpoints").iterdir()]
    found = results(run("sources", *sources))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
