"""What many members need on many devices, beside what the compiler reports and by hand."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdrop import ensemble
from jdrop.network import Network
from jdrop.study import plan
from jdrop.study.cli import run_command
from jdrop.study.data import Dataset
from jdrop.study.methods import adam
from jdrop.study.models import MLP, Model
from jdrop.study.plan import (
    LOOP_CAUTION,
    MemberCost,
    measure_member,
    member_of_size,
    plan_layout,
)

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 400, 30, 5
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(NUM_EXAMPLES, NUM_FEATURES)).astype(np.float32)
LABELS = (np.arange(NUM_EXAMPLES) % NUM_CLASSES).astype(np.int32)
DATA = Dataset("noise", INPUTS, LABELS, INPUTS, LABELS, NUM_CLASSES)

# Units of the hidden layer, and the batch size: more state than activations, and the reverse.
SIZES = [(300, 10), (100, 200)]


def network_of(units):
    return Model(partial(MLP, (units,), NUM_CLASSES)).dropout


@pytest.fixture(scope="module", params=SIZES, ids=str)
def measured(request):
    units, batch_size = request.param
    network = network_of(units)
    cost = measure_member(network, adam(0.01), DATA, batch_size=batch_size, epochs=3)
    return units, batch_size, network, cost


def test_a_member_is_what_a_hand_counts(measured):
    units, batch_size, _, cost = measured
    weights = NUM_FEATURES * units + units * NUM_CLASSES
    parameters = weights + units + NUM_CLASSES
    assert cost.num_parameters == parameters
    # Weights and two moments, the step, and the count of Adam.
    assert cost.state_bytes == 12 * parameters + 8
    assert cost.largest_bytes == 4 * NUM_FEATURES * units
    assert cost.data_bytes == 4 * NUM_EXAMPLES * (NUM_FEATURES + 1)
    assert cost.steps == 3 * NUM_EXAMPLES // batch_size
    # There is no gradient of the inputs, so the first layer takes 4 instead of 6.
    dense = batch_size * (6 * weights - 2 * NUM_FEATURES * units)
    assert dense < cost.step_flops < dense + batch_size * 30 * units + 30 * parameters
    # Compilers let gradients take the place of activations. Either must fit, with some copies.
    hidden = 4 * batch_size * units
    held = cost.gradient_bytes + cost.activation_bytes
    inputs_and_orders = 40 * batch_size * NUM_FEATURES + 20 * NUM_EXAMPLES
    assert max(4 * weights, hidden) <= held < 10 * parameters + 8 * hidden + inputs_and_orders
    assert (cost.activation_bytes > 4 * cost.gradient_bytes) == (batch_size == 200)


@pytest.mark.parametrize(("members", "at_once"), [(4, 4), (8, 8), (8, 4)])
def test_the_memory_of_a_device_is_what_the_compiler_plans(measured, members, at_once):
    _, batch_size, network, cost = measured
    key = jax.eval_shape(lambda: jax.random.key(0))
    init = partial(
        ensemble.init_ensemble, network=network, optimizer=adam(0.01), ensemble_size=members
    )
    state = jax.eval_shape(lambda key: init(key, inputs=INPUTS[:1]), key)
    fit = partial(
        ensemble.fit_ensemble, num_epochs=1, batch_size=batch_size, members_at_once=at_once
    )
    memory = jax.jit(fit).lower(key, state, INPUTS, LABELS).compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert cost.data_bytes + 2 * members * cost.state_bytes == pytest.approx(held, rel=0.01)
    planned = cost.device_bytes(members, at_once)
    assert planned == pytest.approx(held + memory.temp_size_in_bytes, rel=0.1)
    beside = planned - cost.data_bytes - 2 * members * cost.state_bytes
    assert beside == pytest.approx(memory.temp_size_in_bytes, rel=0.3)


def test_a_model_known_by_its_size_takes_16_bytes_a_parameter():
    cost = member_of_size(10**9, activation_bytes=2e9, examples=10**6, batch_size=10**4, epochs=2)
    assert cost.shared_bytes(1) == 16e9 + 2e9
    assert cost.shared_bytes(4) == (16e9 + 2e9) / 4
    assert cost.step_flops == 6 * 10**9 * 10**4
    assert cost.steps == 200


def cost_of(**changes):
    """D = 100, S = 12, G = 4, A = 8, L = 4, F = 6, b = 4, 10 steps."""
    fields = dict(
        num_parameters=1, state_bytes=12.0, gradient_bytes=4.0, activation_bytes=8.0,
        largest_bytes=4.0, data_bytes=100.0, step_flops=6.0, batch_size=4, steps=10,
    )  # fmt: skip
    return MemberCost(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "members", "devices", "usable", "expected"),
    [
        # All at once: 100 + 2 * 3 * 12 + 3 * 12 = 208.
        ({}, 20, 8, 208.0, ("member", 1, 3, 1, 3, 208.0)),
        # Half of 16 at once takes 100 + 16 * 24 + 8 * 24 = 676, as all at once; a quarter fits.
        ({}, 16, 1, 600.0, ("member", 1, 16, 1, 4, 580.0)),
        # Without a chunk that fits: 5 members of 36 each and the data in a fit.
        ({}, 13, 1, 300.0, ("member", 1, 13, 3, 5, 280.0)),
        # A member takes 136. With half of the batch it takes 100 + 24 + 4 + 4 = 132.
        ({}, 8, 8, 135.0, ("batch", 2, 2, 2, 1, 132.0)),
        # Four times as many devices as members; the batch of 4 is divided among 4.
        ({}, 2, 8, 1000.0, ("batch", 4, 1, 1, 1, 130.0)),
        # Nothing divides a batch of 5 among 2, 4 or 8. A donated state: 100 + 24.
        ({"batch_size": 5}, 16, 8, 130.0, ("inside", 1, 2, 2, 1, 124.0)),
        # 100 + 24 / 4 + 4 = 110; among 2 it is 116.
        ({}, 8, 8, 111.0, ("inside", 4, 4, 4, 1, 110.0)),
        ({}, 8, 8, 100.0, ("none", 8, 8, 8, 1, 107.0)),
    ],
)  # fmt: skip
def test_the_first_axis_that_makes_a_member_fit_is_taken(
    changes, members, devices, usable, expected
):
    layout = plan_layout(cost_of(**changes), members, devices, usable)
    assert (
        layout.axis, layout.devices_per_member, layout.members, layout.fits,
        layout.members_at_once, layout.device_bytes,
    ) == expected  # fmt: skip
    assert layout.seconds is None
    if layout.axis != "none":
        assert layout.device_bytes <= usable


def test_hours_are_those_of_the_device_with_the_most_members():
    # 20 members on 8 devices: 3 members of 10 steps of 6 FLOPs.
    assert plan_layout(cost_of(), 20, 8, 300.0, 2.0).seconds == 3 * 10 * 6 / 2
    # 4 devices share each of 2 members.
    assert plan_layout(cost_of(), 2, 8, 300.0, 2.0).seconds == 10 * 6 / (4 * 2)
    assert plan_layout(cost_of(), 8, 8, 100.0, 2.0).seconds is None


def test_the_command_prints_a_table_for_a_model_and_its_data(capsys):
    command = "plan --members 1000 --devices 8,64 --device-memory 2GiB --hidden 8 --train-size 120"
    assert run_command(command.split()) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "as compiled for cpu: 610 parameters" in printed
    assert "1,000 members on devices of 2 GiB" in printed
    assert "member: Each device trains its own members" in printed
    assert LOOP_CAUTION not in printed


def test_the_command_says_that_a_loop_counts_once(capsys, monkeypatch):
    """A network that applies a layer in a scan inside a jit, for ten times and for a thousand."""

    def scanned(count):
        @jax.jit
        def hidden(params, inputs):
            def layer(x, _):
                return jnp.tanh(x @ params), None

            return jax.lax.scan(layer, inputs, length=count)[0]

        def apply_fn(variables, inputs, key):
            return hidden(variables["params"], inputs)

        network = Network(apply_fn, lambda key, inputs: {"params": jnp.eye(NUM_FEATURES)})
        return measure_member(network, adam(0.01), DATA, batch_size=1, epochs=1)

    few, many = scanned(10), scanned(1000)
    assert many.step_flops < 2 * few.step_flops
    assert few.has_loop
    monkeypatch.setattr(plan, "measure_member", lambda *_, **__: few)
    command = "plan --members 1000 --devices 8 --device-memory 2GiB --hidden 8 --train-size 120"
    assert run_command(command.split()) == 0
    assert LOOP_CAUTION in " ".join(capsys.readouterr().out.split())


def test_the_command_prints_json_of_a_model_known_by_its_size(capsys):
    command = "plan --members 10000 --devices 8,512 --device-memory 16GB --parameters 1e9 --json"
    command += " --train-size 1000 --batch-size 100 --epochs 1 --flops-per-second 1e14"
    assert run_command(command.split()) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["member"]["state_bytes"] == 12e9
    # 12.8 GB are usable, and 16 / 2 = 8 GB are needed, so 256 pairs have 40 members at most.
    assert [layout["axis"] for layout in printed["layouts"]] == ["inside", "inside"]
    assert printed["layouts"][1]["devices_per_member"] == 2
    assert printed["layouts"][1]["seconds"] == 40 * 10 * 6e11 / 2e14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--parameters 1e9", "--parameters needs --train-size"),
        ("--parameters 1e9 --train-size 9 --hidden 8", "--hidden has no effect beside"),
        ("--activations 1GB", "--activations is for --parameters"),
        ("--device-memory 80", "must be a size such as 80GiB"),
        ("--parameters nan", "nan is not a number"),
        ("--devices 8,0", "must be positive integers"),
    ],
)
def test_options_of_a_plan_that_do_not_fit_are_refused(capsys, options, message):
    command = f"plan --members 10 --device-memory 1GB {options}"
    assert run_command(command.split()) != 0
    assert message in capsys.readouterr().err
