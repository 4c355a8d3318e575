"""Members of an ensemble, and the examples of their batches, spread over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from networks import NETWORKS, softmax_regression

from jdrop import ensemble, train
from jdrop.batching import MemberMap
from jdrop.meshes import check_mesh, place

pytestmark = pytest.mark.grid

NETWORK = softmax_regression(rate=0.5)

INPUTS, LABELS = np.linspace(-1, 1, 64, dtype=np.float32).reshape(16, 4), np.arange(16) % 3

# Terms of order 1, rounded at 6e-8, through 8 steps of size 0.1.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def make_mesh(members, batch=1):
    axes = ("member", "batch") if batch > 1 else ("member",)
    devices = np.array(jax.devices()[: members * batch])
    return Mesh(devices.reshape(members, batch) if batch > 1 else devices, axes)


def train_on(mesh, key, ensemble_size, network=NETWORK, rows=None, batching="vmap"):
    """The states before and after a fit, the losses, and predictions with dropout."""
    init_key, fit_key, predict_key = jax.random.split(jax.random.clone(key), 3)
    before = ensemble.init_ensemble(
        init_key,
        network,
        optax.sgd(0.1, momentum=0.9),
        INPUTS,
        ensemble_size=ensemble_size,
        mesh=mesh,
    )
    sizes = {"num_epochs": 2, "batch_size": 4}
    after, losses = ensemble.fit_ensemble(
        fit_key, before, INPUTS, LABELS, rows=rows, batching=batching, mesh=mesh, **sizes
    )
    log_probs = ensemble.predict(predict_key, network, after.variables, INPUTS, mesh=mesh)
    return before, after, losses, log_probs


def assert_equal(one, other, **tolerance):
    tolerance = tolerance or {"rtol": 0}
    for leaf, other_leaf in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, other_leaf, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_members_in_turn_are_bit_for_bit_the_same_on_any_number_of_devices(getkey, num_devices):
    key = getkey()
    expected = train_on(None, key, 8, batching="scan")
    assert_equal(train_on(make_mesh(num_devices), key, 8, batching="scan"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize("kind", NETWORKS)
def test_members_at_once_are_the_same_up_to_rounding(getkey, num_devices, kind):
    key = getkey()
    expected = train_on(None, key, 8, NETWORKS[kind])
    assert_equal(train_on(make_mesh(num_devices), key, 8, NETWORKS[kind]), expected, **ROUNDING)


@pytest.mark.parametrize(("num_members", "num_devices"), [(5, 4), (3, 8), (5, 2)])
def test_devices_need_not_divide_the_members(getkey, num_members, num_devices):
    key = getkey()
    rows = (np.arange(num_members * 12) % 16).reshape(num_members, 12)
    results = train_on(make_mesh(num_devices), key, num_members, rows=rows, batching="scan")
    assert all(leaf.shape[0] == num_members for leaf in jax.tree.leaves(results))
    assert_equal(results, train_on(None, key, num_members, rows=rows, batching="scan"))


@pytest.mark.parametrize("num_members", [5, 9, 10])
def test_with_surplus_members_each_device_holds_its_own_alone(getkey, num_members):
    """The rule for sizes that the devices do not divide: train more, and drop the surplus."""
    key, num_trained = getkey(), -(-num_members // 8) * 8
    results = train_on(make_mesh(8), key, num_trained, batching="scan")
    for leaf in jax.tree.leaves(results):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {num_trained // 8}
        assert len({shard.device for shard in leaf.addressable_shards}) == 8
    asked_for = jax.tree.map(lambda leaf: leaf[:num_members], results)
    assert_equal(asked_for, train_on(None, key, num_members, batching="scan"))


@pytest.mark.slow
def test_a_second_axis_divides_the_examples_of_a_batch(getkey):
    key, network = getkey(), NETWORKS["linen"]  # Batch normalisation couples the examples.
    results = train_on(make_mesh(2, batch=4), key, 4, network)
    # On batches of 4 the normalisation divides by a standard deviation that may be as small as the
    # root of its epsilon, 1e-5, and so multiplies each rounding by up to 316.
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    assert_equal(results, train_on(None, key, 4, network), **tolerance)


def test_each_device_holds_its_own_members_alone(getkey):
    for tree in train_on(make_mesh(4), getkey(), 8):
        for leaf in jax.tree.leaves(tree):
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}
            assert len({shard.device for shard in leaf.addressable_shards}) == 4


def compiled_text(mesh, function, ensemble_size=8):
    """The compiled program of a fit or of a step, as text."""
    members = MemberMap(mesh=check_mesh(mesh))
    state = ensemble.init_ensemble(
        jax.random.key(0), NETWORK, optax.adam(0.1), INPUTS, ensemble_size=ensemble_size, mesh=mesh
    )
    indices, key = jnp.arange(ensemble_size), jax.random.key(1)
    if function == "fit_ensemble":
        data = place(members.mesh, (key, INPUTS, LABELS), (indices, state, None))
        lowered = ensemble.fit_members.lower(*data, 2, 4, members)
    else:
        data = ensemble._place_step(members, key, state, (INPUTS, LABELS), False)
        lowered = ensemble._train_step.lower(*data, members)
    return lowered.compile().as_text()


COLLECTIVE = re.compile(
    r"\b(?:all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter|ragged-all-to-all)"
    r"(?:-start)?\("
)


@pytest.mark.parametrize("ensemble_size", [8, 16])
@pytest.mark.parametrize("function", ["fit_ensemble", "train_step"])
def test_members_do_not_communicate(function, ensemble_size):
    assert not COLLECTIVE.search(compiled_text(make_mesh(8), function, ensemble_size))


@pytest.mark.parametrize("function", ["fit_ensemble", "train_step"])
def test_examples_communicate_within_a_member(function):
    """Of eight devices, 2 i and 2 i + 1 hold the same members."""
    lines = compiled_text(make_mesh(4, batch=2), function).splitlines()
    lines = [line for line in lines if COLLECTIVE.search(line)]
    assert lines
    for line in lines:
        assert re.search(
            r"replica_groups=(?:\[4,2\]<=\[8\]|\{\{0,1\},\{2,3\},\{4,5\},\{6,7\}\})", line
        ), line


@pytest.mark.parametrize("member_batches", [False, True])
@pytest.mark.parametrize("mesh", [make_mesh(4), make_mesh(2, batch=2)], ids=["member", "batch"])
def test_a_step_on_a_mesh_is_the_step(getkey, member_batches, mesh):
    key, batch = getkey(), (INPUTS, LABELS)
    if member_batches:
        batch = tuple(np.stack([np.roll(array, i, 0) for i in range(8)]) for array in batch)
    state = ensemble.init_ensemble(getkey(), NETWORK, optax.sgd(0.1), INPUTS, ensemble_size=8)
    options = {"member_batches": member_batches}
    expected = ensemble.train_step(jax.random.clone(key), state, batch, **options)
    result = ensemble.train_step(key, state, batch, mesh=mesh, **options)
    assert_equal(result, expected, **ROUNDING)
    assert result[1].sharding.spec == PartitionSpec("member")


@pytest.mark.slow
def test_a_mesh_inside_jit(getkey):
    key, mesh = getkey(), make_mesh(4)
    results = jax.jit(lambda key: train_on(mesh, key, 8)[2])(key)
    assert_equal(results, train_on(None, key, 8)[2], **ROUNDING)


def test_the_meshes_of_make_mesh_and_data_on_one_device(getkey):
    """JAX refuses arrays on different devices in one program, unless they are moved."""
    key, mesh = getkey(), jax.make_mesh((4,), ("member",))
    state = ensemble.init_ensemble(getkey(), NETWORK, optax.sgd(0.1), INPUTS, ensemble_size=4)
    data = jax.device_put((INPUTS, LABELS), jax.devices()[1])
    sizes = {"num_epochs": 1, "batch_size": 8}
    expected = ensemble.fit_ensemble(jax.random.clone(key), state, INPUTS, LABELS, **sizes)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec("member")))
    assert_equal(ensemble.fit_ensemble(key, state, *data, mesh=mesh, **sizes), expected, **ROUNDING)


@pytest.mark.slow
def test_auto_on_a_mesh(getkey):
    state = ensemble.init_ensemble(getkey(), NETWORK, optax.sgd(0.1), INPUTS, ensemble_size=4)
    mesh, sizes = make_mesh(2), {"num_epochs": 1, "batch_size": 8, "batching": "auto"}
    _, losses = ensemble.fit_ensemble(getkey(), state, INPUTS, LABELS, mesh=mesh, **sizes)
    assert losses.sharding.spec == PartitionSpec("member")
    _, losses = ensemble.train_step(getkey(), state, (INPUTS, LABELS), mesh=mesh, batching="auto")
    assert losses.sharding.spec == PartitionSpec("member")


def test_one_network_with_its_batches_on_several_devices(getkey):
    mesh, key, network = make_mesh(1, batch=8), getkey(), NETWORKS["linen"]
    state = train.TrainState.create(network, network.init(getkey(), INPUTS), optax.sgd(0.1))
    data = jax.device_put((INPUTS, LABELS), NamedSharding(mesh, PartitionSpec()))
    sizes = {"num_epochs": 2, "batch_size": 8}
    expected = train.fit(jax.random.clone(key), state, INPUTS, LABELS, **sizes)
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    fit = train.fit.lower(key, state, *data, batch_sharding=sharding, **sizes).compile()
    assert COLLECTIVE.search(fit.as_text())
    assert_equal(
        train.fit(key, state, *data, batch_sharding=sharding, **sizes), expected, **ROUNDING
    )


@pytest.mark.parametrize(
    ("mesh", "error", "message"),
    [
        (jax.devices()[:2], TypeError, r"jax\.sharding\.Mesh, got list; .*make_mesh"),
        (Mesh(jax.devices(), "batch"), ValueError, r"have the axis 'member', .* got \('batch',\)"),
        (
            Mesh(np.array(jax.devices()).reshape(4, 2), ("member", "model")),
            ValueError,
            r"may have the axis 'batch' besides, got \('member', 'model'\)",
        ),
    ],
    ids=["no mesh", "no members", "another axis"],
)
def test_a_mesh_of_another_form_is_an_error(mesh, error, message):
    with pytest.raises(error, match=message):
        check_mesh(mesh)
