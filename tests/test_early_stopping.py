"""Early stopping of each member of an ensemble at its own best epoch."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from networks import NETWORKS, softmax_regression
from test_train import make_data

import jdrop.linen
from jdrop import early_stopping, ensemble, thinned, train
from jdrop.early_stopping import fit_with_early_stopping
from jdrop.network import Network, predict

OPTIMIZER = optax.sgd(0.1, momentum=0.9)

# Batched matrix products sum in another order than single ones: terms of order 1, rounded at 6e-8,
# through tens of steps of size 0.1.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


def assert_equal(tree, other, **tolerance):
    """Compares pytrees, which must be exactly equal without a tolerance."""
    for leaf, other_leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, other_leaf, **(tolerance or {"rtol": 0}))


def member(state, index):
    return jax.tree.map(lambda leaf: leaf[index], state)


def make_state(key, network, inputs, ensemble_size=4, loss_fn=train.cross_entropy):
    return ensemble.init_ensemble(
        key, network, OPTIMIZER, inputs, ensemble_size=ensemble_size, loss_fn=loss_fn
    )


def table_network():
    """A network with the index of the epoch as its output, for epochs of one step."""

    def train_fn(variables, inputs, key):
        return inputs * variables["params"], {**variables, "epoch": variables["epoch"] + 1}

    def apply_fn(variables, inputs, key):
        return variables["table"][variables["epoch"]] * jnp.ones(len(inputs))

    def init_fn(key, inputs):
        return {"params": jnp.zeros(()), "epoch": jnp.zeros((), int), "table": jnp.zeros(13)}

    return Network(apply_fn, init_fn, train_fn)


def fit_table(key, table, **options):
    """A fit whose validation losses are the rows of a table, `[member, epoch]`."""
    inputs = jnp.ones(2)
    state = make_state(
        jax.random.key(0), table_network(), inputs, len(table), lambda outputs, labels: outputs
    )
    padded = jnp.pad(jnp.asarray(table), ((0, 0), (1, 12 - table.shape[1])))
    state.variables["table"] = padded
    options = {"num_epochs": table.shape[1], "patience": 3, "batch_size": 2, **options}
    return state, fit_with_early_stopping(
        key, state, inputs, inputs, validation_data=(inputs, inputs), **options
    )


def one_stop_in_each_epoch(num_members):
    """Losses with which, with patience 1, member i has its best epoch i + 1 and stops one later."""
    epochs, members = np.arange(num_members + 1), np.arange(num_members)[:, None]
    return np.abs(epochs - members + 0.25).astype(np.float32)


def stop_in_a_loop(losses, patience):
    """The best epoch, and the number of epochs, of one network."""
    best, best_epoch, wait = np.inf, 0, 0
    for epoch, loss in enumerate(losses, 1):
        wait += 1
        if np.isfinite(loss) and loss < best:
            best, best_epoch, wait = loss, epoch, 0
        if wait == patience:
            break
    return best_epoch, epoch


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("num_members", [1, 5, 12])
def test_each_member_stops_by_the_rule_for_one_network(getkey, num_members, patience):
    rng = np.random.default_rng(num_members)
    # Few different values make ties; the members' curves turn at different epochs.
    turns = rng.integers(1, 12, (num_members, 1))
    table = np.abs(np.arange(12) - turns) + rng.integers(0, 2, (num_members, 12))
    _, result = fit_table(getkey(), table.astype(np.float32), patience=patience)
    expected = [stop_in_a_loop(losses, patience) for losses in table]
    assert result.best_epoch.tolist() == [best for best, _ in expected]
    assert result.state.step.tolist() == [best for best, _ in expected]
    assert result.state.variables["epoch"].tolist() == [best for best, _ in expected]
    assert result.validation_losses.shape[1] == max(count for _, count in expected)
    for losses, row, (_, count) in zip(result.validation_losses, table, expected, strict=True):
        np.testing.assert_array_equal(losses[:count], row[:count])
        assert np.isnan(losses[count:]).all()
    np.testing.assert_array_equal(np.isnan(result.train_losses), np.isnan(result.validation_losses))


def test_losses_that_are_not_finite_are_no_improvement(getkey):
    nan, inf = np.nan, np.inf
    table = [
        [2, 1, nan, nan, nan, 0],
        [2, inf, 1, 3, 3, 3],
        [nan, inf, -inf, 1, 1, 1],
        [nan, nan, 2, 1, nan, 3],
    ]
    state, result = fit_table(getkey(), np.array(table, np.float32))
    assert result.best_epoch.tolist() == [2, 3, 0, 4]
    assert (~np.isnan(result.train_losses)).sum(1).tolist() == [5, 6, 3, 6]
    assert_equal(member(result.state, 2), member(state, 2))


@pytest.mark.parametrize(
    ("num_members", "num_devices", "sizes"),
    [
        (8, 0, [8, 8, 8, 8, 8, 4, 4, 2, 1]),
        (5, 0, [5, 5, 5, 3, 2, 1]),
        (8, 2, [8, 8, 8, 8, 8, 4, 4, 2, 2]),
    ],
)
def test_programs_shrink_as_members_stop(getkey, monkeypatch, num_members, num_devices, sizes):
    sizes_of_programs = []

    def fit_members(shared, of_members, *settings):
        sizes_of_programs.append(len(of_members[0]))
        return ensemble.fit_members(shared, of_members, *settings)

    monkeypatch.setattr(early_stopping, "fit_members", fit_members)
    table = one_stop_in_each_epoch(num_members)
    mesh = Mesh(jax.devices()[:num_devices], ("member",)) if num_devices else None
    _, result = fit_table(getkey(), table, patience=1, mesh=mesh)
    running = num_members - np.maximum(np.arange(num_members + 1) - 1, 0)
    assert (~np.isnan(result.train_losses)).sum(0).tolist() == running.tolist()
    assert sizes_of_programs == sizes


def test_each_size_is_compiled_once(getkey, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        fit_table(getkey(), one_stop_in_each_epoch(8), patience=1)
    for name in ("fit_members", "_validate"):
        compiled = [text for text in caplog.messages if f"Compiling jit({name})" in text]
        assert len(compiled) == len([8, 4, 2, 1])


def check_against_fit_ensemble(key, state, data, validation_data, options, **tolerance):
    """Compares each epoch with `fit_ensemble` in parts of one epoch; returns the result."""
    options = {"batch_size": 4, **options}
    result = fit_with_early_stopping(
        key, state, *data, validation_data=validation_data, num_epochs=12, patience=2, **options
    )
    after = state
    for epoch in range(result.validation_losses.shape[1]):
        after, losses = ensemble.fit_ensemble(
            jax.random.clone(key), after, *data, num_epochs=1, **options
        )
        trained = ~np.isnan(result.validation_losses[:, epoch])
        assert_equal(
            member(result.train_losses, (trained, epoch)),
            member(losses, (trained, 0)),
            **tolerance,
        )
        best = result.best_epoch == epoch + 1
        assert_equal(member(result.state, best), member(after, best), **tolerance)
    return result


@pytest.mark.grid
@pytest.mark.parametrize("batching", ["vmap", "scan"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_members_are_those_of_fit_ensemble_with_their_best_epochs(getkey, kind, batching):
    inputs, labels = make_data(getkey(), 48)
    state = make_state(getkey(), NETWORKS[kind], inputs, 6)
    data, validation_data = (inputs[:16], labels[:16]), (inputs[16:], labels[16:])
    tolerance = ROUNDING if batching == "vmap" else {}
    result = check_against_fit_ensemble(
        getkey(), state, data, validation_data, {"batching": batching}, **tolerance
    )
    # Otherwise no program has shrunk.
    assert np.isnan(result.train_losses[:, -1]).sum() >= 3


def test_a_member_is_that_of_one_fit_of_best_epoch_epochs(getkey):
    inputs, labels = make_data(getkey(), 48)
    state, key = make_state(getkey(), NETWORKS["linen"], inputs, 2), getkey()
    data, options = (inputs[:16], labels[:16]), {"batch_size": 4, "batching": "scan"}
    result = fit_with_early_stopping(
        key, state, *data, validation_data=(inputs, labels), num_epochs=9, patience=2, **options
    )
    num_epochs = int(result.best_epoch[0])
    whole, _ = ensemble.fit_ensemble(
        jax.random.clone(key), state, *data, num_epochs=num_epochs, **options
    )
    assert_equal(member(result.state, 0), member(whole, 0))
    # Each member goes on from its own step.
    further, _ = ensemble.fit_ensemble(
        jax.random.clone(key), result.state, *data, num_epochs=1, **options
    )
    whole, _ = ensemble.fit_ensemble(jax.random.clone(key), whole, *data, num_epochs=1, **options)
    assert_equal(member(further, 0), member(whole, 0))


def test_a_python_loop_over_single_networks_stops_at_the_same_epochs(getkey):
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(16)(x))
            return nn.Dense(3)(jdrop.linen.Dropout(0.5, deterministic=not train)(x))

    inputs, labels = make_data(getkey(), 64)
    train_data, validation_data = (inputs[:32], labels[:32]), (inputs[32:], labels[32:])
    network, init_key, fit_key = jdrop.linen.as_network(MLP()), getkey(), getkey()
    result = fit_with_early_stopping(
        fit_key,
        make_state(init_key, network, inputs, 3),
        *train_data,
        validation_data=validation_data,
        num_epochs=30,
        patience=4,
        batch_size=8,
    )
    init_keys, fit_keys = (
        ensemble.member_keys(jax.random.clone(key), 3) for key in (init_key, fit_key)
    )
    for index in range(3):
        variables = network.init(init_keys[index], inputs)
        state = train.TrainState.create(network, variables, OPTIMIZER)
        losses, best, best_epoch, key = [], np.inf, 0, fit_keys[index]
        for epoch in range(1, 31):
            state, _ = train.fit(key, state, *train_data, num_epochs=1, batch_size=8)
            key = jax.random.clone(key)
            log_probs = predict(None, network, state.variables, validation_data[0])
            losses.append(-np.mean(log_probs[np.arange(32), validation_data[1]]))
            if losses[-1] < best:
                best, best_epoch, variables = losses[-1], epoch, state.variables
            if epoch - best_epoch >= 4:
                break
        assert result.best_epoch[index] == best_epoch
        validation_losses = result.validation_losses[index]
        np.testing.assert_allclose(validation_losses[: len(losses)], losses, **ROUNDING)
        assert np.isnan(validation_losses[len(losses) :]).all()
        assert_equal(member(result.state.variables, index), variables, **ROUNDING)


@pytest.mark.parametrize(
    "options", [{"members_at_once": 2}, {"rows": np.arange(48).reshape(4, 12)}], ids=str
)
def test_options_of_fit_ensemble(getkey, options):
    inputs, labels = make_data(getkey(), 48)
    state = make_state(getkey(), NETWORKS["linen"], inputs)
    data = inputs, labels
    check_against_fit_ensemble(getkey(), state, data, data, options, **ROUNDING)


@pytest.mark.slow
def test_auto_is_timed_once(getkey, caplog):
    inputs, labels = make_data(getkey(), 20)
    state = make_state(getkey(), NETWORKS["linen"], inputs)
    with caplog.at_level(logging.INFO, "jdrop"):
        check_against_fit_ensemble(
            getkey(),
            state,
            (inputs, labels),
            (inputs, jnp.flip(labels)),
            {"batching": "auto"},
            **ROUNDING,
        )
    assert len([text for text in caplog.messages if "is the faster" in text]) == 1


@pytest.mark.grid
@pytest.mark.parametrize("num_members", [6, 8])
@pytest.mark.parametrize("axes", [{"member": 4}, {"member": 2, "batch": 2}], ids=str)
def test_members_on_several_devices(getkey, axes, num_members):
    inputs, labels = make_data(getkey(), 48)
    state = make_state(getkey(), softmax_regression(0.5), inputs, num_members)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(tuple(axes.values())), tuple(axes))
    key, options = getkey(), {"num_epochs": 12, "patience": 2, "batch_size": 16}
    data, validation_data = (inputs[:16], labels[:16]), (inputs[16:], labels[16:])
    expected, result = (
        fit_with_early_stopping(
            jax.random.clone(key), state, *data, validation_data=validation_data, mesh=m, **options
        )
        for m in (None, mesh)
    )
    assert_equal(result, expected, **ROUNDING)
    assert np.isnan(result.train_losses[:, -1]).sum() >= num_members / 2  # It has shrunk.


@pytest.mark.slow
def test_a_thinned_network(getkey):
    inputs, labels = make_data(getkey(), 48)
    network = thinned.thin(NETWORKS["linen"], inputs, block_size=2)
    state = make_state(getkey(), network, inputs)
    data, validation_data = (inputs[:16], labels[:16]), (inputs[16:], labels[16:])
    check_against_fit_ensemble(getkey(), state, data, validation_data, {}, **ROUNDING)


@pytest.mark.slow
def test_a_regression_with_pytrees_and_auxiliary_outputs(getkey):
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = jnp.stack([x["a"], x["b"]], -1)
            x = jdrop.linen.Dropout(0.2, deterministic=not train)(nn.relu(nn.Dense(8)(x)))
            x = nn.Dense(2)(x)
            return {"mean": x[:, 0], "variance": nn.softplus(x[:, 1]) + 0.1}

    def loss_fn(outputs, labels):
        losses = train.gaussian_nll((outputs["mean"], outputs["variance"]), labels["y"])
        return losses, {"errors": jnp.abs(outputs["mean"] - labels["y"])}

    inputs = {"a": jax.random.normal(getkey(), (16,)), "b": jax.random.normal(getkey(), (16,))}
    data = inputs, {"y": inputs["a"] + jax.random.normal(getkey(), (16,))}
    state = make_state(getkey(), jdrop.linen.as_network(Heads()), inputs, 4, loss_fn)
    validation_data = jax.tree.map(jnp.flip, data)
    result = check_against_fit_ensemble(getkey(), state, data, validation_data, {}, **ROUNDING)
    losses, aux = result.train_losses
    assert aux["errors"].shape == (*losses.shape, 4)


def test_outputs_that_predictions_lack_need_a_loss_of_their_own(getkey):
    class TwoOutputs(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = jdrop.linen.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(8)(x)))
            return {"logits": nn.Dense(3)(x), "hidden": x}

    def loss_fn(outputs, labels):
        penalty = 1e-3 * jnp.sum(outputs["hidden"] ** 2, -1)
        return train.cross_entropy(outputs["logits"], labels) + penalty

    inputs, labels = make_data(getkey())
    network = jdrop.linen.as_network(TwoOutputs(), outputs="logits")
    state, key = make_state(getkey(), network, inputs, 2, loss_fn), getkey()
    options = {"validation_data": (inputs, labels), "num_epochs": 2, "patience": 2, "batch_size": 8}
    with pytest.raises(TypeError):
        fit_with_early_stopping(key, state, inputs, labels, **options)
    result = fit_with_early_stopping(
        jax.random.clone(key),
        state,
        inputs,
        labels,
        validation_loss_fn=train.cross_entropy,
        **options,
    )
    assert np.isfinite(result.validation_losses).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"num_epochs": 0}, ValueError, "num_epochs must be at least 1, got 0"),
        (
            {"validation_data": (jnp.ones((3, 4)), jnp.zeros(2, int))},
            ValueError,
            "validation inputs and validation labels must .* got 3 in validation inputs and 2 in",
        ),
        (
            {"validation_data": (jnp.ones((0, 4)), jnp.zeros(0, int))},
            ValueError,
            "at least 1 example, got 0",
        ),
        ({"validation_data": jnp.ones((3, 4))}, TypeError, r"a tuple \(inputs, labels\), got Arr"),
        ({"validation_data": (jnp.ones(3),) * 3}, TypeError, r"\(inputs, labels\), got tuple of 3"),
        ({"batch_size": 17}, ValueError, r"batch_size must lie in \[1, 16\]"),
        ({"rows": jnp.zeros((3, 4), int)}, ValueError, "with the 2 members"),
        ({"validation_loss_fn": lambda outputs, labels: 0}, TypeError, "array of losses"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_invalid_arguments(getkey, options, error, message):
    inputs, labels = make_data(getkey())
    state = make_state(getkey(), NETWORKS["linen"], inputs, 2)
    valid = {"validation_data": (inputs, labels), "num_epochs": 2, "patience": 1, "batch_size": 8}
    with pytest.raises(error, match=message):
        fit_with_early_stopping(getkey(), state, inputs, labels, **{**valid, **options})


def test_a_single_network_is_an_error(getkey):
    inputs, labels = make_data(getkey())
    state = member(make_state(getkey(), NETWORKS["linen"], inputs, 2), 0)
    options = {"validation_data": (inputs, labels), "num_epochs": 2, "patience": 1, "batch_size": 8}
    with pytest.raises(ValueError, match="state must have a member axis"):
        fit_with_early_stopping(getkey(), state, inputs, labels, **options)


@pytest.mark.parametrize("arguments", ["traced", "constants"])
def test_inside_jit_is_an_error(getkey, arguments):
    inputs, labels = make_data(getkey())
    state, key = make_state(getkey(), NETWORKS["linen"], inputs, 2), getkey()
    options = {"validation_data": (inputs, labels), "num_epochs": 2, "patience": 1, "batch_size": 8}

    @jax.jit
    def fit(traced_key):
        used = traced_key if arguments == "traced" else key
        return fit_with_early_stopping(used, state, inputs, labels, **options).best_epoch

    with pytest.raises(ValueError, match=r"cannot run inside jax\.jit"):
        fit(getkey())
