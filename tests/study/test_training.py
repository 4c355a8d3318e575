"""Networks trained together: on every device, from any checkpoint, each with its own key."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import jdrop.linen
from jdrop import ensemble
from jdrop.study import checkpoints
from jdrop.study.data import Dataset
from jdrop.study.diverged import DivergedError
from jdrop.study.methods import WEIGHT_DECAYS
from jdrop.study.models import MLP, Model
from jdrop.study.programs import batching_by_rule
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings
from jdrop.study.training import NetworkSpec, Trainer, Validation

SETTINGS = Settings(replicates=2, batch_size=10)
MODEL = Model(lambda: MLP((4,), 3))
ADAM = optax.adam(0.01)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(50, 5)).astype(np.float32)
    labels = (np.argmax(inputs[:, :3], 1)).astype(np.int32)
    return Dataset("noise", inputs[:40], labels[:40], inputs[40:], labels[40:], 3)


def train(folder, data, progress=lambda *call: None, *, stops=(), validation=None, **changes):
    spec = dataclasses.replace(NetworkSpec(MODEL.dropout, 2, 6, ADAM, record=True), **changes)
    trainer = Trainer(RunFolder(folder, {}), SETTINGS, progress)
    return trainer.fit_networks(
        jax.random.key(0),
        spec,
        data,
        checkpoint="networks",
        description="networks",
        stops=stops,
        validation=validation,
    )


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Conv(4, (3,))(x[..., None]).mean(1))


def test_members_with_convolutions_train_in_turn_on_a_cpu(monkeypatch):
    cnn = jdrop.linen.as_network(CNN(), has_dropout=False)
    inputs = jax.ShapeDtypeStruct((1, 5), np.float32)

    def choice(network):
        init = partial(ensemble.init_ensemble, ensemble_size=2)
        state = jax.eval_shape(
            lambda key, inputs: init(key, network, ADAM, inputs), jax.random.key(0), inputs
        )
        return batching_by_rule(network, state.variables, inputs)

    assert choice(cnn) == "scan"
    assert choice(MODEL.dropout) == "vmap"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choice(cnn) == "vmap"


@pytest.mark.slow
def test_a_cnn_trains_on_one_device_as_on_all(tmp_path, data, monkeypatch):
    cnn = jdrop.linen.as_network(CNN(), has_dropout=False)
    many = train(tmp_path / "many", data, network=cnn)
    device, *others = jax.local_devices()
    assert others
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    one = train(tmp_path / "one", data, network=cnn)
    for leaf, other in zip(*(jax.tree.leaves(run.variables) for run in (one, many)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-4)


class KilledError(Exception):
    pass


def test_a_training_that_is_stopped_anywhere_ends_the_same(tmp_path, data, monkeypatch):
    """Each stop is at another epoch, and a new trainer goes on from the last checkpoint."""
    whole = train(tmp_path / "whole", data, stops=(2, 6))
    monkeypatch.setattr(checkpoints, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(checkpoints, "SECONDS_WORTH_A_CHECKPOINT", 0.0)
    monkeypatch.setattr(checkpoints, "WRITING_SHARE", np.inf)
    folder = tmp_path / "parts" / "checkpoints" / "networks"
    kept = 0
    for last in (3, 5, 7):
        epochs = []

        def stop(what, done, total, epochs=epochs, last=last):
            if what.startswith("training"):
                epochs.append(done)
                if done == last:
                    raise KilledError

        if last < 7:
            with pytest.raises(KilledError):
                train(tmp_path / "parts", data, stop, stops=(2, 6))
        else:
            parts = train(tmp_path / "parts", data, stop, stops=(2, 6))
        assert epochs[0] == kept + 1
        # The last epochs may have ended while the checkpoint before them was written.
        kept = max(int(path.stem) for path in folder.glob("*.json"))
        assert epochs[0] <= kept
    jax.tree.map(np.testing.assert_array_equal, parts.variables, whole.variables)
    assert parts.log.learning_curve == whole.log.learning_curve
    assert parts.epoch_flops == whole.epoch_flops
    # The networks stay until the part is stored that is made of them.
    num_epochs = len(epochs)
    again = train(tmp_path / "parts", data, stop, stops=(2, 6))
    jax.tree.map(np.testing.assert_array_equal, again.variables, whole.variables)
    assert len(epochs) == num_epochs


@pytest.mark.slow
def test_a_member_is_the_same_among_more_members(tmp_path, data):
    few = train(tmp_path / "few", data, members=1).variables[6]
    many = train(tmp_path / "many", data, members=3).variables[6]
    for one, other in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        assert len(one) == 2
        assert len(other) == 6
        np.testing.assert_allclose(one, other[:2], rtol=1e-5, atol=1e-6)
        assert not np.allclose(other[0], other[1])


def test_larger_weight_decays_give_smaller_weights(tmp_path, data):
    adamw = optax.inject_hyperparams(optax.adamw)(0.05, weight_decay=0.0)
    members = len(WEIGHT_DECAYS)
    trained = train(
        tmp_path, data, network=MODEL.plain, members=members, optimizer=adamw, epochs=30,
        weight_decays=WEIGHT_DECAYS,
    )  # fmt: skip
    kernel = trained.variables[30]["params"]["Dense_0"]["kernel"]
    norms = np.sqrt((kernel**2).sum((1, 2))).reshape(members, 2)
    assert (np.diff(norms, axis=0)[1:] < 0).all()


@pytest.mark.slow
def test_networks_are_kept_at_every_stop(tmp_path, data):
    """A network that was kept on the way is the network whose training ends there."""
    kept = train(tmp_path / "kept", data, stops=(2, 5)).variables
    assert [*kept] == [2, 5]
    for epochs in (2, 5):
        alone = train(tmp_path / str(epochs), data, epochs=epochs).variables
        jax.tree.map(np.testing.assert_array_equal, kept[epochs], alone[epochs])
    assert not np.array_equal(*(jax.tree.leaves(kept[epochs])[0] for epochs in (2, 5)))


def validation_on(left_out, epochs, is_enough=lambda scores: False):
    """Every network trains on the first 30 examples and is scored on others."""

    def losses(epoch, variables):
        return [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(variables)]

    def rows(epoch):
        return np.tile(np.resize(np.arange(30), 40), (4, 1))

    return Validation(rows, epochs, losses, is_enough)


@pytest.mark.slow
def test_validation_scores_networks_that_train_on_its_rows(tmp_path, data):
    trained = train(tmp_path / "rows", data, validation=validation_on(range(30, 40), (1, 3)))
    assert len(trained.log.validation) == 2
    assert trained.variables == {}
    other_labels = np.where(np.arange(40) < 30, data.train_labels, 0).astype(np.int32)
    blind = dataclasses.replace(data, train_labels=other_labels)
    again = train(tmp_path / "blind", blind, validation=validation_on(range(30, 40), (1, 3)))
    assert again.log.validation == trained.log.validation
    seen = train(tmp_path / "seen", blind, stops=(3,)).variables[3]
    unseen = train(tmp_path / "unseen", data, stops=(3,)).variables[3]
    assert not np.array_equal(jax.tree.leaves(seen)[0], jax.tree.leaves(unseen)[0])


def test_validation_ends_a_training_when_it_is_enough(tmp_path, data):
    steps = []
    train(
        tmp_path,
        data,
        lambda what, *step: steps.append(step) if what.startswith("training") else None,
        validation=validation_on(range(30, 40), (1, 3, 6), lambda scores: len(scores) == 2),
    )
    assert steps == [(1, 6), (2, 6), (3, 6), (3, 3)]


def test_networks_that_diverge_are_reported(tmp_path, data):
    with pytest.raises(DivergedError, match="4 of 4 networks"):
        train(tmp_path, data, optimizer=optax.sgd(float("inf")))


@pytest.mark.slow
def test_a_network_that_diverges_does_not_disturb_the_others(tmp_path, data):
    """The second of two members of the first replicate diverges: it has an infinite decay."""
    adamw = optax.inject_hyperparams(optax.adamw)(0.05, weight_decay=0.0)
    arguments = {"network": MODEL.plain, "optimizer": adamw, "record": False}
    calm = train(tmp_path / "calm", data, weight_decays=(0.0, 0.1), **arguments).variables[6]
    trained = train(tmp_path / "wild", data, weight_decays=(0.0, float("inf")), **arguments)
    assert trained.log.diverged == [2, 3]
    for leaf, other in zip(*map(jax.tree.leaves, (trained.variables[6], calm)), strict=True):
        np.testing.assert_array_equal(leaf[:2], other[:2])
        assert np.isnan(leaf[2:]).all()


@pytest.mark.parametrize("record", [True, False])
def test_a_learning_curve_is_without_networks_that_diverged(tmp_path, data, record):
    adamw = optax.inject_hyperparams(optax.adamw)(0.05, weight_decay=0.0)
    arguments = {"network": MODEL.plain, "optimizer": adamw, "record": record}
    trained = train(tmp_path, data, weight_decays=(float("inf"), 0.0), **arguments)
    assert trained.log.diverged == [0, 1]
    # The members that are recorded are those that diverge.
    curve = trained.log.learning_curve
    assert curve is None or np.isnan(curve.test["nll"]).all()
