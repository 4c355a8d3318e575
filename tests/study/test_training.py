"""Networks trained together: on every device, from any checkpoint, each with its own key."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jdrop.study import training as training_module
from jdrop.study.data import Dataset
from jdrop.study.methods import WEIGHT_DECAYS
from jdrop.study.models import MLP, Model
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings
from jdrop.study.training import DivergedError, NetworkSpec, Trainer, member_losses

SETTINGS = Settings(replicates=2, batch_size=10)
MODEL = Model(lambda: MLP((4,), 3))
ADAM = optax.adam(0.01)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(50, 5)).astype(np.float32)
    labels = (np.argmax(inputs[:, :3], 1)).astype(np.int32)
    return Dataset("noise", inputs[:40], labels[:40], inputs[40:], labels[40:], 3)


def train(folder, data, progress=lambda *call: None, **changes):
    spec = dataclasses.replace(NetworkSpec(MODEL.dropout, 2, 6, ADAM, record=True), **changes)
    trainer = Trainer(RunFolder(folder, {}), SETTINGS, progress)
    return trainer.fit_networks(
        jax.random.key(0), spec, data, checkpoint="networks", description="networks"
    )


class KilledError(Exception):
    pass


def test_a_training_that_is_stopped_anywhere_ends_the_same(tmp_path, data, monkeypatch):
    """Each stop is at another epoch, and a new trainer goes on from the last checkpoint."""
    whole = train(tmp_path / "whole", data)
    monkeypatch.setattr(training_module, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    first_epochs = []
    for last in (3, 5, 7):
        epochs = []

        def stop(what, done, total, epochs=epochs, last=last):
            if what.startswith("training"):
                epochs.append(done)
                if done == last:
                    raise KilledError

        if last < 7:
            with pytest.raises(KilledError):
                train(tmp_path / "parts", data, stop)
        else:
            parts = train(tmp_path / "parts", data, stop)
        first_epochs.append(epochs[0])
    assert first_epochs == [1, 3, 5]
    jax.tree.map(np.testing.assert_array_equal, parts.variables, whole.variables)
    assert parts.log.learning_curve == whole.log.learning_curve
    assert parts.train_flops == whole.train_flops
    assert not list((tmp_path / "parts" / "checkpoints").iterdir())


def test_a_member_is_the_same_among_more_members(tmp_path, data):
    few = train(tmp_path / "few", data, members=1).variables
    many = train(tmp_path / "many", data, members=3).variables
    for one, other in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        assert len(one) == 2
        assert len(other) == 6
        np.testing.assert_allclose(one, other[:2], rtol=1e-5, atol=1e-6)
        assert not np.allclose(other[0], other[1])


def test_validation_keeps_the_best_state_and_varies_the_decay(tmp_path, data):
    adamw = optax.inject_hyperparams(optax.adamw)(0.05, weight_decay=0.0)
    members = len(WEIGHT_DECAYS)
    trained = train(
        tmp_path, data, network=MODEL.plain, members=members, optimizer=adamw, epochs=30,
        weight_decays=WEIGHT_DECAYS,
    )  # fmt: skip
    kernel = trained.variables["params"]["Dense_0"]["kernel"]
    norms = np.sqrt((kernel**2).sum((1, 2))).reshape(members, 2)
    assert (np.diff(norms, axis=0)[1:] < 0).all()
    best, last = np.array(trained.log.best_losses), np.array(trained.log.last_losses)
    assert (best <= last).all()
    assert len(best) == 2 * members
    # 36 of 40 examples are trained on, in batches of 10: 3 steps an epoch, and not 4.
    plain = train(tmp_path / "all", data, network=MODEL.plain, optimizer=adamw, epochs=30)
    assert trained.train_flops == pytest.approx(plain.train_flops * 3 / 4)


def test_the_best_state_has_the_best_loss_on_held_out_examples(tmp_path, data, monkeypatch):
    held_out = {}

    def member_losses_on(network, variables, inputs, labels):
        held_out["examples"] = inputs, labels
        return member_losses(network, variables, inputs, labels)

    monkeypatch.setattr(training_module, "member_losses", member_losses_on)
    adamw = optax.inject_hyperparams(optax.adamw)(0.3, weight_decay=0.0)
    trained = train(
        tmp_path, data, network=MODEL.plain, members=4, optimizer=adamw, epochs=8,
        weight_decays=WEIGHT_DECAYS,
    )  # fmt: skip
    again = member_losses(MODEL.plain, trained.best_variables, *held_out["examples"])
    np.testing.assert_allclose(again, trained.log.best_losses, rtol=1e-5)
    assert len(held_out["examples"][1]) == 4


def test_networks_that_diverge_are_reported(tmp_path, data):
    with pytest.raises(DivergedError, match="4 of 4 networks"):
        train(tmp_path, data, optimizer=optax.sgd(float("inf")))
