"""Members of an ensemble in chunks, for as little memory as there is."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from networks import softmax_regression

from jdrop import batching, ensemble, memory
from jdrop.batching import MemberMap
from jdrop.memory import MembersAtOnce, choose_members_at_once
from jdrop.network import Network

pytestmark = pytest.mark.grid

NETWORK = softmax_regression(rate=0.5)

INPUTS, LABELS = np.linspace(-1, 1, 64, dtype=np.float32).reshape(16, 4), np.arange(16) % 3

SIZES = {"num_epochs": 1, "batch_size": 4}

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


class Program:
    """A program whose compiler plans so many bytes, or refuses."""

    def __init__(self, num_bytes, limit=np.inf):
        self.num_bytes, self.limit = num_bytes, limit

    def compile(self):
        if self.num_bytes > self.limit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return self

    def memory_analysis(self):
        self.temp_size_in_bytes = self.num_bytes
        self.output_size_in_bytes = self.alias_size_in_bytes = 7
        return self


class Device:
    """A device with 1000 bytes, of which 80 % of 900 are usable."""

    def memory_stats(self):
        return {"bytes_limit": 1000, "bytes_in_use": 100}


def make_state(key, ensemble_size, inputs=INPUTS, network=NETWORK):
    return ensemble.init_ensemble(
        key, network, optax.sgd(0.1), inputs[:1], ensemble_size=ensemble_size
    )


@pytest.fixture
def usable(monkeypatch):
    """Sets the usable memory of every device, and forgets earlier choices."""
    monkeypatch.setattr(batching, "_remembered", {})

    def set_bytes(num_bytes):
        monkeypatch.setattr(memory, "_usable_bytes", lambda device: num_bytes)

    return set_bytes


@pytest.mark.parametrize(
    ("bytes_of_member", "limit", "choice"),
    [(45, np.inf, 16), (46, np.inf, 8), (720, np.inf, 1), (800, np.inf, 1), (100, 300, 2)],
)
def test_members_are_halved_until_they_fit(bytes_of_member, limit, choice):
    chosen = choose_members_at_once(
        lambda count: Program(count * bytes_of_member, limit), 16, Device()
    )
    assert (chosen.choice, chosen.usable_bytes) == (choice, 720)
    assert chosen.bytes_of_choice == choice * bytes_of_member


def test_other_errors_of_the_compiler_are_raised():
    class Broken:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        choose_members_at_once(lambda count: Broken(), 16, Device())


def test_the_devices_of_a_cpu_share_the_memory_of_the_machine():
    shares = [memory._usable_bytes(device) for device in jax.devices()]
    assert len(set(shares)) == 1
    # From a MiB to 16 TiB.
    assert 2**20 < sum(shares) < 2**44


def test_the_choice_is_a_sentence_with_its_reason():
    assert str(MembersAtOnce(8, 16, 76.0 * 2**30, 38.0 * 2**30, 60.0 * 2**30)) == (
        "members_at_once=8: the 16 members of a device need 76 GiB at once and 38 GiB in such "
        "chunks, and 60 GiB are usable."
    )
    assert "even that needs 4 GiB" in str(MembersAtOnce(1, 2, 2.0**33, 2.0**32, 2.0**30))


@pytest.mark.parametrize("members_at_once", [1, 2, 3, 7])
def test_chunks_of_members_equal_all_at_once(getkey, members_at_once):
    state, key, predict_key = make_state(getkey(), 5), getkey(), getkey()
    results = []
    for count in (5, members_at_once):
        after, losses = ensemble.fit_ensemble(
            jax.random.clone(key), state, INPUTS, LABELS, members_at_once=count, **SIZES
        )
        log_probs = ensemble.predict(
            jax.random.clone(predict_key),
            NETWORK,
            after.variables,
            INPUTS,
            members_at_once=count,
        )
        results.append(jax.tree.leaves((after, losses, log_probs)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, **ROUNDING)


@pytest.mark.slow
def test_a_fit_takes_as_many_members_as_fit_and_warns_once(getkey, usable, caplog):
    state, key = make_state(getkey(), 8), getkey()
    members = MemberMap(members_at_once=2)
    data = (key, INPUTS, LABELS), (jnp.arange(8), state, None)
    plan = ensemble.fit_members.lower(*data, 1, 4, members).compile().memory_analysis()
    usable(float(plan.temp_size_in_bytes + plan.output_size_in_bytes))
    expected = ensemble.fit_ensemble(key, state, INPUTS, LABELS, members_at_once=2, **SIZES)
    for _ in range(2):
        result = ensemble.fit_ensemble(jax.random.clone(key), state, INPUTS, LABELS, **SIZES)
        jax.tree.map(np.testing.assert_array_equal, result, expected)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("members_at_once=2: the 8 members of a device need ")


def test_enough_memory_is_not_worth_a_word(getkey, usable, caplog):
    usable(2.0**40)
    ensemble.fit_ensemble(getkey(), make_state(getkey(), 3), INPUTS, LABELS, **SIZES)
    assert not caplog.records


def test_the_planned_program_is_compiled_once(getkey, usable, caplog):
    usable(2.0**40)
    state, key = make_state(getkey(), 6), getkey()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        ensemble.fit_ensemble(key, state, INPUTS, LABELS, **SIZES)
    compiled = [text for text in caplog.messages if "Compiling jit(fit_members)" in text]
    assert len(compiled) == 1


@pytest.mark.slow
def test_members_of_a_device_count_on_a_mesh(getkey, usable, caplog):
    usable(0.0)
    mesh = Mesh(jax.devices()[:2], "member")
    ensemble.fit_ensemble(getkey(), make_state(getkey(), 4), INPUTS, LABELS, mesh=mesh, **SIZES)
    assert "members_at_once=1, but even that needs" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("members_at_once", [0, -1])
def test_fewer_than_one_member_at_once_is_an_error(getkey, members_at_once):
    state = make_state(getkey(), 2)
    match = f"at least 1, .* got {members_at_once} with"
    with pytest.raises(ValueError, match=match):
        ensemble.fit_ensemble(
            getkey(), state, INPUTS, LABELS, members_at_once=members_at_once, **SIZES
        )
    with pytest.raises(ValueError, match=match):
        ensemble.predict(None, NETWORK, state.variables, INPUTS, members_at_once=members_at_once)


def test_members_in_turn_have_no_chunks(getkey):
    with pytest.raises(ValueError, match="got 2 with batching='scan'"):
        ensemble.fit_ensemble(
            getkey(),
            make_state(getkey(), 2),
            INPUTS,
            LABELS,
            batching="scan",
            members_at_once=2,
            **SIZES,
        )


@pytest.mark.slow
def test_the_memory_of_a_large_ensemble_is_a_few_times_its_data():
    """16 members on 20 MiB of data. A neighbour's library asked for 76 GiB."""
    num_examples, num_features, hidden = 5120, 1024, 256
    data = num_examples * num_features * 4

    def init_fn(key, inputs):
        key, other = jax.random.split(key)
        return {
            "params": [
                jax.random.normal(key, (num_features, hidden)) / 32,
                jax.random.normal(other, (hidden, 10)) / 16,
            ]
        }

    def apply_fn(variables, inputs, key):
        first, last = variables["params"]
        return jax.nn.relu(inputs @ first) @ last

    network = Network(apply_fn, init_fn)
    inputs = jax.ShapeDtypeStruct((num_examples, num_features), jnp.float32)
    labels = jax.ShapeDtypeStruct((num_examples,), jnp.int32)
    key, indices = jax.random.key(0), jnp.arange(16)
    state = jax.eval_shape(
        lambda: ensemble.init_ensemble(
            key, network, optax.adam(1e-3), jnp.ones((1, num_features)), ensemble_size=16
        )
    )
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    temporary = {}
    for members_at_once in (16, 2):
        members = MemberMap(members_at_once=members_at_once)
        fit = ensemble.fit_members.lower(
            (key, inputs, labels), (indices, state, None), 1, 50, members
        )
        analysis = fit.compile().memory_analysis()
        # The data are an argument, once for all members.
        assert analysis.argument_size_in_bytes < data + state_bytes + 2**20
        temporary[members_at_once] = analysis.temp_size_in_bytes
    # The members in training, their gradients and their batches.
    assert temporary[16] < 3 * state_bytes + data
    assert temporary[2] < temporary[16] / 2
    predict = ensemble._predict.lower(
        (None, inputs), (indices, state.variables), network, False, MemberMap("scan")
    )
    activations = num_examples * hidden * 4
    outputs = 16 * num_examples * 10 * 4
    assert predict.compile().memory_analysis().temp_size_in_bytes < 3 * activations + outputs
