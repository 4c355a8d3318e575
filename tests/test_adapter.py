"""How `as_network` binds a call, and its check that the mode reaches the layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jdrop.calls
import jdrop.linen
import jdrop.nnx
from jdrop.calls import bind_call
from jdrop.dependence import trace
from jdrop.network import Network, consumed_keys

X = jnp.linspace(-1, 1, 12).reshape(3, 4)
linen, nnx_ = jdrop.linen.as_network, jdrop.nnx.as_network


def arguments(call: Any, inputs: Any, *, train: bool = True, key: Any = None) -> Any:
    """What a module with this call gets for the inputs."""
    module_class = type("Net", (), {"__call__": call})
    given = []

    def module(*args: Any, **kwargs: Any) -> None:
        given.append((args, kwargs))

    bind_call(module_class, lambda key: ("rngs of", key))(module, inputs, train=train, key=key)
    return given[0]


# The arguments of a call.


def test_known_flags_and_their_opposites_get_the_mode():
    def call(self, x, deterministic, train=False, training=None, is_training=0, enable_dropout=1):
        pass

    on = {"train": True, "training": True, "is_training": True, "enable_dropout": True}
    assert arguments(call, 1) == ((1,), {"deterministic": False, **on})
    off = dict.fromkeys(on, False)
    assert arguments(call, 1, train=False) == ((1,), {"deterministic": True, **off})


def test_the_flag_of_batch_statistics_is_set_unless_it_follows_another():
    def call(self, x, use_running_average):
        pass

    def following(self, x, train, use_running_average=None):
        pass

    assert arguments(call, 1) == ((1,), {"use_running_average": False})
    assert arguments(following, 1) == ((1,), {"train": True})


def test_boolean_defaults_that_are_no_modes_are_left_alone():
    def call(
        self, x, *, train, debug=False, decode=True, init=False, mutable=True, use_cache=False,
        return_dict=True, output_attentions=False, capture_intermediates=False, verbose=True,
        stop_gradient=False,
    ):  # fmt: skip
        pass

    assert arguments(call, 1) == ((1,), {"train": True})


def test_a_dictionary_gives_arguments_by_name_only_if_its_keys_are_names():
    def call(self, batch, mask=None, train=False):
        pass

    assert arguments(call, {"batch": 1, "mask": 2}) == ((), {"batch": 1, "mask": 2, "train": True})
    whole = {"tokens": 1, "lengths": 2}
    assert arguments(call, whole) == ((whole,), {"train": True})
    with pytest.raises(ValueError, match=r"key 'labels'.*takes batch, mask, train.*\*\*inputs"):
        arguments(call, {"batch": 1, "labels": 2})


def test_a_tuple_gives_several_arguments_only_to_a_call_that_takes_several():
    def several(self, x, train, y=None, scale=1.0):
        pass

    def single(self, pair, train, scale=1.0):
        pass

    def variadic(self, *args):
        pass

    assert arguments(several, (1, 2)) == ((1,), {"y": 2, "train": True})
    assert arguments(single, (1, 2)) == (((1, 2),), {"train": True})
    assert arguments(variadic, (1, 2)) == ((1, 2), {})
    assert arguments(variadic, 1) == ((1,), {})
    with pytest.raises(ValueError, match=r"tuple of 4, but the call of Net takes 3 inputs"):
        arguments(several, (1, 2, 3, 4))


def test_an_argument_that_nothing_gives_is_an_error_that_shows_a_call():
    def call(self, tokens, positions, is_training):
        pass

    with pytest.raises(ValueError, match=r"'positions'.*module\(inputs, is_training=train\)"):
        arguments(call, 1)


def test_keys_are_given_by_their_names():
    def call(self, x, key, rng=None, rngs=None):
        pass

    key = jax.random.key(0)
    args, kwargs = arguments(call, 1, key=key)
    assert args == (1,)
    assert kwargs == {"key": key, "rng": key, "rngs": ("rngs of", key)}
    assert arguments(call, 1, train=False) == ((1,), {"key": None})


def test_the_keys_of_attention_are_inputs():
    def call(self, query, key, value):
        pass

    assert arguments(call, (1, 2, 3), key=jax.random.key(0)) == ((1, 2, 3), {})


class Body(nn.Module):
    """Subclasses have calls."""

    @nn.compact
    def run(self, x, train):
        x = nn.Dense(4)(x)
        return nn.Dense(2)(jdrop.linen.Dropout(0.5)(x, deterministic=not train))


class Flagged(Body):
    def __call__(self, x, train=False):
        return self.run(x, train)


class EvalMode(Body):
    def __call__(self, x, eval_mode=True):
        return self.run(x, not eval_mode)


class NoCall(Body):
    def encode(self, x, train):
        return self.run(x, train)


class NnxFlagged(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.drop = nnx.Linear(4, 2, rngs=rngs), jdrop.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=False):
        return self.dense(self.drop(x, deterministic=not train))


def test_an_unknown_boolean_default_is_an_error_until_the_call_is_given(getkey):
    example = "lambda module, inputs, *, train, key: module(inputs, eval_mode=not train)"
    with pytest.raises(ValueError, match="'eval_mode' that is True") as raised:
        linen(EvalMode())
    assert example in str(raised.value)
    network = linen(EvalMode(), call=eval(example))
    variables = network.init(getkey(), X)
    assert consumed_keys(network, variables, X)


def test_a_module_without_a_call_needs_one(getkey):
    with pytest.raises(ValueError, match=r"NoCall has no __call__.*module\.encode"):
        linen(NoCall())
    network = linen(NoCall(), lambda module, inputs, *, train, key: module.encode(inputs, train))
    assert consumed_keys(network, network.init(getkey(), X), X)


@pytest.mark.parametrize(
    ("make", "module"), [(linen, Flagged()), (nnx_, NnxFlagged)], ids=["linen", "nnx"]
)
def test_the_call_sees_the_mode_and_a_key_of_its_own(make, module, getkey):
    seen = []

    def call(module, inputs, *, train, key):
        seen.append((train, key))
        return module(inputs, train=train)

    network = make(module, call)
    variables = network.init(getkey(), X)
    key, other = getkey(), getkey()
    seen.clear()
    network(variables, X, None)
    network(variables, X, jax.random.clone(key))
    network.apply_train(variables, X, key)
    network(variables, X, other)
    # Predictions of nnx are traced once more, by the check.
    assert set(seen[:-3]) == {(False, None)}
    assert [train for train, _ in seen[-3:]] == [True, True, True]
    first, second, third = (jax.random.key_data(key).tolist() for _, key in seen[-3:])
    assert first == second != third


def test_a_loss_sees_all_outputs_and_a_prediction_those_that_are_chosen(getkey):
    def call(module, inputs, *, train, key):
        logits = module(inputs, train)
        return {"logits": logits, "others": (logits, inputs)}

    for outputs in ("logits", lambda everything: everything["others"][0]):
        network = linen(Flagged(), call, outputs=outputs)
        variables = network.init(getkey(), X)
        assert network(variables, X, None).shape == (3, 2)
        assert network(variables, X, getkey()).shape == (3, 2)
        assert set(network.apply_train(variables, X, getkey())[0]) == {"logits", "others"}


def test_outputs_that_are_not_there_are_an_error(getkey):
    network = linen(Flagged(), lambda m, x, *, train, key: {"y": m(x, train)}, outputs="logits")
    variables = network.init(getkey(), X)
    with pytest.raises(ValueError, match=r"outputs='logits' is not in .* dict with y"):
        network(variables, X, None)


# The check.


class Wrapper(nn.Module):
    net: nn.Module

    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.net(*args, **kwargs)


class NoBoolean(Body):
    def __call__(self, x, is_eval=None, mode="eval"):
        return self.run(x, mode != "eval")


class NnxWrapper(nnx.Module):
    def __init__(self, rngs):
        self.net = NnxFlagged(rngs)

    def __call__(self, *args, **kwargs):
        return self.net(*args, **kwargs)


def mapped(in_axes):
    split_rngs = {"params": False, "dropout": True}
    return nn.vmap(
        Flagged, variable_axes={"params": None}, split_rngs=split_rngs, in_axes=in_axes
    )()


UNREACHED: dict[str, Any] = {
    "wrapper": (linen, Wrapper(Flagged()), "net/Dropout_0", "module(inputs, train=train)"),
    "no Boolean default": (linen, NoBoolean(), "Dropout_0", "mode='train' if train else 'eval'"),
    "nn.Sequential": (linen, nn.Sequential([nn.Dense(4), Flagged()]), "layers_1", "module.layers"),
    "nn.vmap": (linen, mapped((0,)), "Dropout_0", "by position"),
    "nnx wrapper": (nnx_, NnxWrapper, "net/drop", "module(inputs, train=train)"),
    "nnx.Sequential": (
        nnx_,
        lambda rngs: nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), NnxFlagged(rngs)),
        "layers/1/drop",
        "module.layers",
    ),
}


@pytest.mark.filterwarnings("ignore:kwargs are not supported in vmap:RuntimeWarning")
@pytest.mark.parametrize("name", UNREACHED)
def test_a_mode_that_does_not_reach_the_layers_is_an_error(name, getkey):
    make, module, layer, way_out = UNREACHED[name]
    with pytest.raises(ValueError, match=r"draws no mask in training.*has_dropout=False") as raised:
        make(module).init(getkey(), X)
    assert layer in str(raised.value)
    assert way_out in str(raised.value)
    # The same where the variables come from elsewhere.
    variables = make(module, has_dropout=False).init(getkey(), X)
    for use in (make(module), make(module).apply_train):
        with pytest.raises(ValueError, match="draws no mask in training"):
            use(variables, X, getkey())


@pytest.mark.filterwarnings("error")
def test_flags_by_position_reach_a_lifted_module(getkey):
    network = linen(mapped((0, None)), lambda module, inputs, *, train, key: module(inputs, train))
    variables = network.init(getkey(), X)
    assert consumed_keys(network, variables, X)
    assert jnp.isfinite(network(variables, X, None)).all()


def test_a_network_without_dropout_says_so(getkey):
    plain = nn.Sequential([nn.Dense(4), nn.relu])
    with pytest.raises(ValueError, match="no dropout layer, or none that its mode switches on"):
        linen(plain).init(getkey(), X)
    network = linen(plain, has_dropout=False)
    assert consumed_keys(network, network.init(getkey(), X), X) == ()


def test_a_layer_that_is_switched_on_at_the_rate_0_is_enough(getkey):
    module = nn.Sequential([nn.Dense(4), jdrop.linen.Dropout(0.0, deterministic=False)])
    network = linen(module)
    assert consumed_keys(network, network.init(getkey(), X), X) == ()


def test_a_head_of_zeros_hides_no_mask(getkey):
    module = nn.Sequential(
        [nn.Dropout(0.5, deterministic=False), nn.Dense(2, kernel_init=nn.initializers.zeros)]
    )
    network = linen(module)
    assert consumed_keys(network, network.init(getkey(), X), X)


class AlwaysTraining(nnx.Module):
    """Drops unless told not to, which its call cannot tell."""

    def __init__(self, rngs):
        self.net = NnxFlagged(rngs)

    def __call__(self, x):
        return self.net(x, train=True)


def test_nnx_predictions_with_dropout_on_are_an_error(getkey):
    network = nnx_(AlwaysTraining)
    variables = network.init(getkey(), X)
    with pytest.raises(ValueError, match=r"masks without a key: net/drop stays on in prediction"):
        network(variables, X, None)
    fixed = nnx_(AlwaysTraining, lambda module, x, *, train, key: module.net(x, train))
    assert jnp.array_equal(fixed(variables, X, None), fixed(variables, X, None))


def test_nnx_predictions_with_masks_by_hand_are_an_error(getkey):
    class Hand(nnx.Module):
        def __init__(self, rngs):
            self.rngs, self.drop = rngs, nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(x) * jax.random.bernoulli(self.rngs.noise(), 0.5, x.shape)

    network = nnx_(Hand)
    variables = network.init(getkey(), X)
    with pytest.raises(ValueError, match=r"without a key: .*test_adapter\.py:\d+ stays on"):
        network(variables, X, None)


class OwnBatchNorm(nnx.BatchNorm):
    """Uses the statistics of the batch whatever it is told."""

    def __call__(self, x):
        return super().__call__(x, use_running_average=False)


def test_nnx_predictions_with_the_statistics_of_the_batch_are_an_error(getkey):
    network = nnx_(lambda rngs: OwnBatchNorm(4, rngs=rngs), has_dropout=False)
    variables = network.init(getkey(), X)
    with pytest.raises(ValueError, match="statistics of its batch in prediction"):
        network(variables, X, None)


class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(x)
        return jdrop.linen.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)


def test_batch_statistics_that_never_move_are_an_error_unless_the_call_is_given(getkey):
    with pytest.raises(ValueError, match="stay as they are in training"):
        linen(Frozen()).init(getkey(), X)
    network = linen(Frozen(), lambda module, inputs, *, train, key: module(inputs))
    variables = network.init(getkey(), X)
    assert "batch_stats" in network.apply_train(variables, X, getkey())[1]
    with pytest.raises(ValueError, match="stay as they are in training"):
        nnx_(NnxFrozen).init(getkey(), X)


class NnxFrozen(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.drop = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(x, use_running_average=True))


def test_spectral_normalisation_counts_as_moving(getkey):
    class Spectral(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
            return jdrop.linen.Dropout(0.5)(x, deterministic=not train)

    network = linen(Spectral())
    assert set(network.init(getkey(), X)) == {"params", "batch_stats"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "module"), [(linen, Flagged()), (nnx_, NnxFlagged)], ids=["linen", "nnx"]
)
def test_each_mode_is_checked_once(make, module, getkey, monkeypatch):
    traced = []

    def count(function, *arguments):
        traced.append(function)
        return trace(function, *arguments)

    monkeypatch.setattr(jdrop.calls, "trace", count)
    network = make(module)
    variables = jax.vmap(network.init, in_axes=(0, None))(jax.random.split(getkey(), 2), X)
    one = jax.tree.map(lambda leaf: leaf[0], variables)
    for _ in range(2):
        jax.jit(network)(one, X, getkey())
        network.apply_train(one, X, getkey())
        network(one, X, None)
        network.replace_dropout(lambda site, x: x)(one, X, getkey())
    assert len(traced) == (1 if make is linen else 2)


def test_a_pass_that_needs_a_named_axis_is_checked_where_the_axis_is(getkey):
    class Synchronised(nn.Module):
        @nn.compact
        def __call__(self, x, train, dropout_on=None):
            x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)
            return jdrop.linen.Dropout(0.5)(x, deterministic=not dropout_on)

    network = linen(Synchronised())
    variables = network.init(getkey(), X)
    mapped = jax.vmap(network.apply_train, in_axes=(None, 0, None), axis_name="batch")
    with pytest.raises(ValueError, match="draws no mask in training"):
        mapped(variables, X[None], getkey())


def test_leaves_of_the_inputs_that_are_no_arrays_stay_as_they_are(getkey):
    class Repeated(Body):
        def __call__(self, x, times, train):
            for _ in range(times):
                x = self.run(x, train) @ jnp.ones((2, 4))
            return x

    network = linen(Repeated())
    with pytest.raises(ValueError, match="draws no mask"):
        linen(Repeated(), lambda m, x, *, train, key: m(*x, False)).init(getkey(), (X, 1))
    assert network(network.init(getkey(), (X, 1)), (X, 1), None).shape == (3, 4)


# What depends on what.


def loops(key, x):
    def step(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0), None

    def with_noise(y):
        noise = jax.random.normal(two)
        return y + noise

    one, two = jax.random.split(key)
    y, _ = jax.lax.scan(step, x, jax.random.split(one, 2))
    return jax.lax.cond(y.sum() > 0, lambda y: y, with_noise, y)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_keys_are_found_inside_loops_branches_and_calls(wrap):
    network = Network(lambda variables, x, key: wrap(loops)(key, x))
    places = consumed_keys(network, {}, X)
    lines = {int(place.rpartition(":")[2]) for place in places}
    first = loops.__code__.co_firstlineno
    assert lines == {first + 2, first + 5}


def test_keys_on_which_nothing_depends_are_no_use():
    def unused(variables, x, key):
        constant = jax.random.normal(jax.random.key(3), x.shape)
        return jax.jit(lambda x, key: (x + constant, jax.random.bits(key)))(x, key)[0]

    assert consumed_keys(Network(unused), {}, X) == ()


def test_a_key_that_reaches_the_state_is_a_use():
    def train(variables, x, key):
        return x, {"state": jax.random.normal(key)}

    network = Network(lambda variables, x, key: x, train_fn=train)
    assert len(consumed_keys(network, {"state": jnp.zeros(())}, X)) == 1


def test_masks_of_ones_own_are_found_with_their_module(getkey):
    class DropPath(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            if train:
                x = x * jax.random.bernoulli(self.make_rng("dropout"), 0.5, (len(x), 1)) * 2
            return x

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = jdrop.linen.Dropout(0.5)(nn.Dense(4)(x), deterministic=not train)
            return nn.remat(DropPath, static_argnums=(2,))(name="path")(x, train)

    network = linen(Net())
    variables = network.init(getkey(), X)
    (place,) = consumed_keys(network.replace_dropout(lambda site, x: x), variables, X)
    assert place.startswith("Net/path (")
    assert len(consumed_keys(network, variables, X)) == 2
