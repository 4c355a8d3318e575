"""The choice between members at once and members one after another."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import softmax_regression

from jdrop import batching, ensemble
from jdrop.batching import Batching, time_batchings

NETWORK = softmax_regression(rate=0.5)

INPUTS, LABELS = np.linspace(-1, 1, 64, dtype=np.float32).reshape(16, 4), np.arange(16) % 3

DURATIONS = {"vmap": 2.0, "scan": 0.5}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it: `clock[0]` is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(batching.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def timed(monkeypatch):
    """Times nothing, and lists what would have been timed; "scan" is always the faster."""
    calls = []

    def time_batchings(run, num_steps=1):
        calls.append(num_steps)
        for name in ("vmap", "scan"):
            run(name)
        return Batching("scan", DURATIONS)

    monkeypatch.setattr(ensemble, "time_batchings", time_batchings)
    monkeypatch.setattr(batching, "_remembered", {})
    return calls


def make_state(key, ensemble_size=3):
    return ensemble.init_ensemble(
        key, NETWORK, optax.sgd(0.1), INPUTS[:1], ensemble_size=ensemble_size
    )


def fit(key, state, **options):
    options = {"num_epochs": 2, "batch_size": 4, **options}
    return ensemble.fit_ensemble(key, state, INPUTS, LABELS, **options)


def assert_equal(one, other):
    for leaf, other_leaf in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, other_leaf)


# Timing.


@pytest.mark.parametrize(
    ("durations", "choice"),
    [({"vmap": 2.0, "scan": 0.5}, "scan"), ({"vmap": 1, "scan": 3}, "vmap")],
)
def test_the_faster_batching_is_chosen(clock, durations, choice):
    def run(name):
        clock[0] += durations[name]

    result = time_batchings(run, num_steps=4)
    assert result.choice == choice
    assert result.seconds == {name: duration / 4 for name, duration in durations.items()}


def test_compilation_and_a_slow_round_do_not_count(clock):
    runs = {"vmap": [100.0, 1.0, 1.0, 50.0], "scan": [1.0, 3.0, 3.0, 3.0]}

    def run(name):
        clock[0] += runs[name].pop(0)

    assert time_batchings(run) == Batching("vmap", {"vmap": 1.0, "scan": 3.0})
    assert runs == {"vmap": [], "scan": []}


def test_the_choice_is_a_sentence_with_its_reason():
    assert str(Batching("scan", {"vmap": 0.2, "scan": 0.0667})) == (
        "batching='scan' is the faster on cpu: a training step of all members takes 200 ms at once "
        "('vmap') and 66.7 ms one after another ('scan')."
    )


def test_a_choice_leaves_the_state_as_it_is_and_consumes_no_key(getkey):
    state, key = make_state(getkey()), getkey()
    before = jax.tree.map(np.array, state)
    result = ensemble.choose_batching(key, state, (INPUTS, LABELS))
    assert_equal(state, before)
    assert result.choice == min(result.seconds, key=result.seconds.get)
    assert all(0 < seconds < 60 for seconds in result.seconds.values())
    after, _ = ensemble.train_step(key, state, (INPUTS, LABELS), batching=result.choice)
    assert after.step.tolist() == [1, 1, 1]


def test_a_choice_for_members_with_batches_of_their_own(getkey):
    batch = np.stack([INPUTS] * 3), np.stack([LABELS] * 3)
    result = ensemble.choose_batching(getkey(), make_state(getkey()), batch, member_batches=True)
    assert set(result.seconds) == {"vmap", "scan"}


# "auto".


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, np.arange(48).reshape(3, 16) % 16])
def test_auto_fits_with_the_faster_batching(getkey, timed, rows):
    state, key = make_state(getkey()), getkey()
    automatic = fit(key, state, rows=rows, batching="auto")
    assert_equal(automatic, fit(jax.random.clone(key), state, rows=rows, batching="scan"))
    assert timed == [3]


@pytest.mark.slow
def test_a_fit_of_fewer_steps_than_are_timed(getkey, timed):
    fit(getkey(), make_state(getkey()), batch_size=16, batching="auto")
    assert timed == [1]


def test_auto_steps_with_the_faster_batching(getkey, timed):
    state, key, batch = make_state(getkey()), getkey(), (INPUTS, LABELS)
    automatic = ensemble.train_step(key, state, batch, batching="auto")
    assert_equal(
        automatic, ensemble.train_step(jax.random.clone(key), state, batch, batching="scan")
    )
    assert timed == [1]


@pytest.mark.slow
def test_auto_logs_its_choice_once_and_remembers_it(getkey, timed, caplog):
    state = make_state(getkey())
    with caplog.at_level(logging.INFO, logger="jdrop"):
        for num_epochs in (1, 2):
            state, _ = fit(getkey(), state, num_epochs=num_epochs, batching="auto")
    assert caplog.messages == [str(Batching("scan", DURATIONS))]
    assert len(timed) == 1


@pytest.mark.slow
def test_auto_times_other_shapes_anew(getkey, timed):
    state = make_state(getkey())
    fit(getkey(), state, batching="auto")
    fit(getkey(), state, batch_size=8, batching="auto")
    fit(getkey(), make_state(getkey(), ensemble_size=2), batching="auto")
    ensemble.train_step(getkey(), state, (INPUTS, LABELS), batching="auto")
    ensemble.train_step(getkey(), state, (INPUTS[:8], LABELS[:8]), batching="auto")
    assert len(timed) == 5


@pytest.mark.parametrize("function", ["fit_ensemble", "train_step", "choose_batching"])
def test_timing_inside_jit_is_an_error(getkey, function):
    functions = {
        "fit_ensemble": lambda key, state: fit(key, state, batching="auto"),
        "train_step": lambda key, state: ensemble.train_step(
            key, state, (INPUTS, LABELS), batching="auto"
        ),
        "choose_batching": lambda key, state: ensemble.choose_batching(
            key, state, (INPUTS, LABELS)
        ),
    }
    with pytest.raises(ValueError, match=r"inside jax\.jit .* call `jdrop\.ensemble\.choose_batch"):
        jax.jit(functions[function])(getkey(), make_state(getkey()))


def test_timing_with_several_processes_is_an_error(getkey, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="'auto' with 2, each of which might choose differently"):
        ensemble.choose_batching(getkey(), make_state(getkey()), (INPUTS, LABELS))


@pytest.mark.parametrize("batch_size", [-1, 0, 17])
def test_auto_checks_the_batch_size_of_a_fit(getkey, batch_size):
    with pytest.raises(ValueError, match=rf"must lie in \[1, 16\], .* got {batch_size}"):
        fit(getkey(), make_state(getkey()), batch_size=batch_size, batching="auto")


def test_auto_checks_that_inputs_are_arrays_of_examples(getkey):
    sizes = {"num_epochs": 1, "batch_size": 4}
    with pytest.raises(ValueError, match="a leading axis of examples"):
        ensemble.fit_ensemble(
            getkey(), make_state(getkey()), jnp.ones(()), LABELS, batching="auto", **sizes
        )
