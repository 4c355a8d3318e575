"""`freeze_deleted`, and thinned steps with optimizers of several parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exactness import QUICK, assert_close, drawn_inputs, drawn_variables
from networks import NETWORKS, softmax_regression

from jdrop.network import Network
from jdrop.thinned import ThinningError, freeze_deleted, thin
from jdrop.train import TrainState, train_step

pytestmark = pytest.mark.grid

PARAMS = {
    "dense": {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "bias": jnp.ones(3)},
    "scale": jnp.float32(2),
}
KEPT = {
    "dense": {
        "kernel": jnp.array([[True], [False]]),
        "bias": jnp.array([True, False, True]),
    },
    "scale": jnp.array(True),
}
IS_KEPT = jax.tree.map(lambda kept, leaf: jnp.broadcast_to(kept, leaf.shape), KEPT, PARAMS)


def labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "adam" if path[-1].key == "kernel" else "sgd", params
    )


def of_kernels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
    "masked": lambda: optax.masked(optax.adamw(0.1), of_kernels),
    "multi_transform": lambda: optax.multi_transform(
        {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, momentum=0.9)}, labels
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
}


def grads_of_step(step):
    grads = jax.tree.map(lambda leaf: jnp.sin(3 * leaf + step), PARAMS)
    return jax.tree.map(lambda grad, kept: jnp.where(kept, grad, 0.0), grads, IS_KEPT)


def arrays_like_params(tree):
    """What a state holds for the parameters, by their path."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
        for name, param in (
            ("kernel", PARAMS["dense"]["kernel"]),
            ("bias", PARAMS["dense"]["bias"]),
        ):
            if keys[-2:] == ("dense", name) and leaf.shape == param.shape:
                found[jax.tree_util.keystr(path)] = (name, leaf)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kept_entries_are_updated_and_deleted_entries_stay(name):
    """In the first step all is kept, in the second a part, as if the rest were not there."""
    optimizer = OPTIMIZERS[name]()
    frozen = freeze_deleted(optimizer)
    state = optimizer.init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, frozen.init(PARAMS), state)
    warm = jax.tree.map(lambda leaf: jnp.cos(5 * leaf), PARAMS)
    updates, state = optimizer.update(warm, state, PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    expected, expected_state = optimizer.update(grads_of_step(1), state, params)
    run = jax.jit(frozen.update, compiler_options=QUICK)
    updates, new_state = run(grads_of_step(1), state, params, kept=KEPT)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)

    def check(kept, update, as_ever):
        assert_close(update[kept], as_ever[kept], rtol=1e-5, atol=1e-6)
        assert (update[~kept] == 0).all()
        assert (update[kept] != 0).any()

    jax.tree.map(check, IS_KEPT, updates, expected)
    before, as_ever, after = map(arrays_like_params, (state, expected_state, new_state))
    moments = {"sgd": 0, "momentum": 2, "masked": 2, "multi_transform": 3}
    assert len(after) == moments.get(name, 4)
    for path, (array, leaf) in after.items():
        kept = IS_KEPT["dense"][array]
        np.testing.assert_array_equal(leaf[~kept], before[path][1][~kept])
        assert_close(leaf[kept], as_ever[path][1][kept], rtol=1e-5, atol=1e-6)
        assert (leaf[kept] != before[path][1][kept]).any()
        # What stays is something, that would have decayed.
        assert (as_ever[path][1][~kept] != before[path][1][~kept]).any()


@pytest.mark.parametrize("name", ["adamw", "chain", "multi_transform", "inject_hyperparams"])
def test_counts_advance_when_everything_is_deleted(name):
    optimizer = freeze_deleted(OPTIMIZERS[name]())
    state = optimizer.init(PARAMS)
    nothing = jax.tree.map(jnp.zeros_like, KEPT)
    updates, state = optimizer.update(grads_of_step(0), state, PARAMS, kept=nothing)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    counts = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32]
    assert counts
    assert all(count == 1 for count in counts)


def test_freeze_deleted_equals_the_optimizer_when_everything_is_kept():
    optimizer, everything = optax.adamw(0.1), jax.tree.map(jnp.ones_like, KEPT)
    state = optimizer.init(PARAMS)
    got = freeze_deleted(optimizer).update(grads_of_step(0), state, PARAMS, kept=everything)
    expected = optimizer.update(grads_of_step(0), state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_freeze_deleted_receives_kept_through_a_chain():
    """Here `kept` goes through the chain, as every extra argument does."""
    optimizer = optax.chain(optax.clip(0.1), freeze_deleted(optax.adam(0.1)), optax.scale(2.0))
    updates, _ = optimizer.update(grads_of_step(0), optimizer.init(PARAMS), PARAMS, kept=KEPT)
    for kept, update in zip(jax.tree.leaves(IS_KEPT), jax.tree.leaves(updates), strict=True):
        np.testing.assert_array_equal(update != 0, kept)


def test_an_update_without_kept_is_an_error(getkey):
    optimizer = freeze_deleted(optax.sgd(0.1))
    state = optimizer.init(PARAMS)
    with pytest.raises(TypeError, match="update needs kept"):
        optimizer.update(grads_of_step(0), state, PARAMS)
    network = softmax_regression(0.5)
    variables = drawn_variables(network, jnp.ones((1, 4)))
    state = TrainState.create(network, variables, optimizer)
    with pytest.raises(TypeError, match="update needs kept"):
        jax.eval_shape(train_step, getkey(), state, (jnp.ones((2, 4)), jnp.zeros(2, int)))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
            "accumulates the gradients of several steps",
        ),
        (optax.lbfgs(), "cannot tell which arrays"),
        (optax.sm3(0.1), "cannot tell which arrays"),
        (optax.adafactor(0.1), "keeps an array of shape"),
    ],
    ids=["multi_steps", "lbfgs", "sm3", "adafactor"],
)
def test_a_thinned_step_raises_for_an_optimizer_whose_state_cannot_be_taken_apart(
    getkey, optimizer, message
):
    network = thin(NETWORKS["linen"], jnp.ones((1, 4)))
    variables = drawn_variables(network, jnp.ones((1, 4)))
    state = TrainState.create(network, variables, optimizer)
    with pytest.raises(ThinningError, match=message):
        jax.eval_shape(train_step, getkey(), state, (jnp.ones((2, 4)), jnp.zeros(2, int)))


def test_freeze_deleted_raises_for_state_of_another_shape():
    """It would become one of the shape of what is kept."""
    optimizer = optax.adafactor(0.1, factored=False)
    with pytest.raises(ThinningError, match=r"of shape \(1,\) for parameters of shape"):
        freeze_deleted(optimizer).update(
            grads_of_step(0), optimizer.init(PARAMS), PARAMS, kept=KEPT
        )


def test_freeze_deleted_in_an_optimizer_of_some_parameters():
    """The rest of the parameters is updated as usual."""
    optimizer = optax.masked(freeze_deleted(optax.adam(0.1)), of_kernels)
    grads = grads_of_step(0)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS, kept=KEPT)
    np.testing.assert_array_equal(updates["dense"]["kernel"][0] != 0, True)
    np.testing.assert_array_equal(updates["dense"]["kernel"][1], 0)
    np.testing.assert_array_equal(updates["dense"]["bias"], grads["dense"]["bias"])


def test_freeze_deleted_raises_for_accumulated_gradients():
    optimizer = optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    with pytest.raises(ThinningError, match="accumulates the gradients of several steps"):
        freeze_deleted(optimizer).update(
            grads_of_step(0), optimizer.init(PARAMS), PARAMS, kept=KEPT
        )


@pytest.mark.parametrize("name", ["masked", "multi_transform", "inject_hyperparams"])
def test_a_thinned_step_with_an_optimizer_whose_state_covers_some_parameters(name, getkey):
    """Their states hold arrays for some parameters only."""

    def apply_fn(variables, inputs, key):
        params = variables["params"]["dense"]
        hidden = jnp.tanh(inputs @ params["kernel"] + params["bias"][None])
        return hidden @ variables["params"]["out"]

    def init_fn(key, inputs):
        return {
            "params": {
                "dense": {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)},
                "out": jnp.zeros((8, 3)),
            }
        }

    inputs = drawn_inputs(4, 4)
    network = thin(Network(apply_fn, init_fn), inputs, {"dense": 0.5}, block_size=1)
    variables = drawn_variables(network, inputs)
    state = TrainState.create(network, variables, OPTIMIZERS[name]())
    key = getkey()
    kept = network.step_rule.draw(jax.random.split(jax.random.clone(key))[0])["dense"]
    step = jax.jit(train_step, compiler_options=QUICK)
    after, _ = step(key, state, (inputs, jnp.zeros(4, int)))
    kernels = [tree["params"]["dense"]["kernel"] for tree in (variables, after.variables)]
    changed = (kernels[0] != kernels[1]).any(0)
    assert sorted(np.flatnonzero(changed)) == kept.tolist()
