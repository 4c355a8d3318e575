"""Inputs that are pytrees or token ids, and models that are networks: from the check to the end."""

import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop.study.comparison import name_of
from jdrop.study.data import DataError, fingerprint, from_arrays, load_table, take
from jdrop.study.data.inputs import checked_inputs
from jdrop.study.models import Model, ModelError, check_model

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype(np.float32)
Y = np.arange(60) % 3
TINY = {
    "replicates": 2,
    "ensemble_size": 2,
    "budget": 2,
    "num_samples": 2,
    "epochs": 2,
    "batch_size": 10,
    "controls": False,
    "progress": False,
}


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (X.astype(np.float64), np.float32),
        (X.astype(np.float16), np.float32),
        (np.ones((3, 2), np.uint8), np.float32),
        (np.ones((3, 2), bool), np.float32),
        ([[1.0, 2.0]], np.float32),
        (((1, 2), (3, 4)), np.int32),
        (np.ones((3, 2), np.int64), np.int32),
        (np.ones((3, 2), np.uint16), np.int32),
    ],
)
def test_floats_and_images_are_float32_and_token_ids_are_int32(array, dtype):
    checked = checked_inputs("inputs", array)
    assert checked.dtype == dtype
    np.testing.assert_array_equal(checked, np.asarray(array, dtype))
    assert checked_inputs("inputs", array, as_features=True).dtype == np.float32


def test_arrays_of_a_pytree_keep_their_kind():
    inputs = {"ids": np.ones((5, 2), int), "mask": np.ones((5, 2), bool), "time": [0.5] * 5}
    inputs["time"] = np.array(inputs["time"])
    checked = checked_inputs("inputs", (inputs, jnp.ones((5, 3), jnp.uint8)))
    dtypes = jax.tree.map(lambda array: array.dtype.name, checked)
    assert dtypes == ({"ids": "int32", "mask": "bool", "time": "float32"}, "float32")


TREE = {"a": X[:, :1], "b": X[:, 1:]}
IDS = np.arange(240).reshape(60, 4)


def changed(**leaves):
    return {**TREE, **leaves}


@pytest.mark.parametrize(
    ("inputs", "test_inputs", "message"),
    [
        ({}, TREE, r"inputs must hold at least one array, got \{\}"),
        (changed(a=X[:50]), TREE, r"all arrays of inputs .* got 50 and, in inputs\['b'\], 60"),
        (changed(a=np.float32(3)), TREE, r"inputs\['a'\] must be \[example, ...\]"),
        (changed(a=X.astype(str)), TREE, r"inputs\['a'\] must be numbers"),
        (changed(b=X * np.nan), TREE, r"inputs\['b'\] must be finite"),
        (TREE, X, "test_inputs must have the structure of the training inputs"),
        (TREE, changed(b=X), r"test_inputs\['b'\] must have examples of shape \(3,\).* got \(4,\)"),
        (X, IDS, "test_inputs must be floats, as the training inputs are, got integers"),
        (IDS * 2**30, IDS, "inputs must be integers that int32 holds.*give floats"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, test_inputs, message):
    with pytest.raises(DataError, match=message):
        from_arrays("a", inputs, Y, test_inputs, Y)


def test_the_identity_of_a_plain_array_is_that_of_earlier_versions():
    data = from_arrays("a", X, Y, X[:6], Y[:6])
    digest = hashlib.sha256()
    for array in (
        data.train_inputs,
        data.train_labels,
        data.test_inputs,
        data.test_labels,
        data.ood_inputs,
    ):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    assert fingerprint(data) == digest.hexdigest()[:16]


def test_the_identity_of_a_pytree_holds_names_and_values():
    trees = [TREE, {"c": TREE["a"], "d": TREE["b"]}, changed(b=X[:, 1:] + 1)]
    assert len({fingerprint(from_arrays("a", tree, Y, tree, Y)) for tree in trees}) == 3


def test_integers_of_a_file_are_features_for_the_mlp_alone(tmp_path):
    path = tmp_path / "ids.npz"
    np.savez(path, inputs=IDS, labels=Y, ood_inputs=IDS)
    options = dict.fromkeys(("target", "task", "test_path", "train_size", "ood_path"))
    for as_features, dtype in ((False, np.int32), (True, np.float32)):
        data = load_table(path, **options, label_noise=0.0, seed=0, as_features=as_features)
        assert data.train_inputs.dtype == data.ood_inputs.dtype == dtype


class Net(nn.Module):
    rate: float = 0.3

    @nn.compact
    def __call__(self, x, train):
        x = jdrop.linen.Dropout(self.rate)(nn.relu(nn.Dense(6)(x)), deterministic=not train)
        return nn.Dense(3)(x)


class TwoInputs(Net):
    """The same network, whose inputs come in two arrays."""

    @nn.compact
    def __call__(self, a, b, train):
        assert a.dtype == b.dtype == jnp.float32
        x = jnp.concatenate([a, b], -1)
        x = jdrop.linen.Dropout(self.rate)(nn.relu(nn.Dense(6)(x)), deterministic=not train)
        return nn.Dense(3)(x)


@pytest.mark.slow
def test_a_pytree_is_compared_as_the_array_of_its_features():
    """Training, tuning, sweeps, learning curves and theory of a dictionary and of one array."""

    def run(factory, inputs):
        train, test = take(inputs, slice(40)), take(inputs, slice(40, 60))
        sweep = {"rate": [0.4], "train_size": [20]}
        return jdrop.compare(factory, train, Y[:40], test, Y[40:], sweep=sweep, **TINY)

    together = run(lambda rate=0.3: Net(rate), X)
    apart = run(lambda rate=0.3: TwoInputs(rate), TREE)
    scores = [
        {
            (method.name, point.size): {s: i.mean for s, i in point.over_seeds.items()}
            for method in comparison.methods
            for point in method.points
            if method.name != "logistic-regression"
        }
        for comparison in (together, apart)
    ]
    assert len(scores[0]) > 5
    assert scores[0].keys() == scores[1].keys()
    for name, expected in scores[0].items():
        assert scores[1][name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    for cell, expected in zip(apart.sweep, together.sweep, strict=True):
        nll, expected_nll = (each.scores["dropout"]["nll"].mean for each in (cell, expected))
        assert nll == pytest.approx(expected_nll, rel=1e-4)
    assert [o.gap["nll"].mean for o in apart.overfitting] == pytest.approx(
        [o.gap["nll"].mean for o in together.overfitting], rel=1e-3, abs=1e-5
    )
    hidden, expected_hidden = (c.co_adaptation["dropout"] for c in (apart, together))
    assert hidden.deletion["nll"] == pytest.approx(expected_hidden.deletion["nll"], rel=1e-4)
    # What needs one array of floats is left out, and the report says so.
    assert not any(method.name == "logistic-regression" for method in apart.methods)
    assert apart.exact is None
    assert apart.data["ood_name"] is None
    text = " ".join(apart.left_out)
    for sentence in (
        "No linear model was fitted, since the inputs are not one array of floats.",
        "There are no out-of-distribution inputs",
        "All masks of a small network were not enumerated",
    ):
        assert sentence in text
        assert sentence not in " ".join(together.left_out)


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, ids, train):
        x = nn.Embed(240, 4)(ids).mean(1)
        return nn.Dense(3)(jdrop.linen.Dropout(0.3)(x, deterministic=not train))


def test_token_ids_reach_an_embedding():
    check_model(Model(Tokens()), from_arrays("a", IDS, Y, IDS, Y))


class ManyOutputs(nn.Module):
    """A call that `as_network` cannot bind by itself."""

    rate: float = 0.3

    @nn.compact
    def __call__(self, a, b, eval_mode=True):
        logits = TwoInputs(self.rate)(a, b, not eval_mode)
        return {"logits": logits, "features": a}


def call(module, inputs, *, train, key):
    return module(**inputs, eval_mode=not train)["logits"]


def call_for_all(module, inputs, *, train, key):
    return module(**inputs, eval_mode=not train)


class NnxNet(nnx.Module):
    def __init__(self, rngs, rate=0.3):
        self.hidden, self.out = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.drop = jdrop.nnx.Dropout(rate, rngs=rngs)

    def __call__(self, a, b):
        x = self.hidden(jnp.concatenate([a, b], -1))
        return self.out(self.drop(nnx.relu(x)))


NETWORKS = {
    "network": jdrop.linen.as_network(ManyOutputs(), call),
    "chosen": jdrop.linen.as_network(ManyOutputs(), call_for_all, outputs="logits"),
    "factory": lambda rate=0.3: jdrop.linen.as_network(ManyOutputs(rate), call),
    "nnx network": jdrop.nnx.as_network(NnxNet),
    "nnx factory": lambda rate=0.3: jdrop.nnx.as_network(lambda rngs: NnxNet(rngs, rate)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_as_network_is_a_model(name):
    model, data = Model(NETWORKS[name]), from_arrays("a", TREE, Y, TREE, Y)
    assert check_model(model, data) == 3
    for network in (model.dropout, model.plain):
        variables = network.init(jax.random.key(0), TREE)
        assert network.apply_train(variables, TREE, jax.random.key(1))[0].shape == (60, 3)
    assert model.changeable == ({"rate"} if "factory" in name else frozenset())
    if "factory" not in name:
        return
    network, holds_rate = model.at_rate(0.9, TREE)
    variables = network.init(jax.random.key(0), TREE)
    if holds_rate:
        variables["rate"] = jnp.float32(0.9)
    almost_all = network(variables, TREE, jax.random.key(1))
    assert not jnp.allclose(almost_all, network(variables, TREE, None))


def test_a_network_that_cannot_be_compared_is_refused():
    data = from_arrays("a", TREE, Y, TREE, Y)
    with pytest.raises(ModelError, match="must have an init_fn and a replace_fn"):
        Model(jdrop.network.Network(lambda v, x, key: x)).plain  # noqa: B018
    everything = jdrop.linen.as_network(ManyOutputs(), call_for_all)
    with pytest.raises(ModelError, match=r"must return one array, got dict; .* outputs="):
        check_model(Model(everything), data)


def test_the_name_of_a_network_is_the_same_in_every_process():
    assert (
        name_of(NETWORKS["network"])
        == name_of(NETWORKS["nnx network"])
        == ("jdrop.network.Network")
    )
