"""The audit: every place where a model drops something, and the mistakes of public models."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop.auditing import Audit
from jdrop.draws import read_draws
from jdrop.network import Network

pytestmark = pytest.mark.grid

INPUTS = jax.ShapeDtypeStruct((5, 7, 4), jnp.float32)

NEVER = "Never on, since off in training too: {}."
ALWAYS = "Always on, since on in evaluation too: {}."
SAME_KEY = "The same key, and so the same mask where the shapes are equal: {}."
ONE_KEY_IN_LOOP = "One key, and so one mask, for all turns of a loop: {}."
BY_HAND = "Random numbers that belong to no dropout layer, so that nothing can replace them: {}."


def names(audit: Audit) -> list[str]:
    return [site.name for site in audit.sites]


def without_lines(audit: Audit) -> list[str]:
    """The faults, with "(line)" for the lines of this file."""
    return [re.sub(r"test_audit\.py:\d+", "line", fault) for fault in audit.faults]


class LinenBlock(nn.Module):
    """Dropout of Flax and jdrop, and attention of both."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.25, broadcast_dims=(1,), deterministic=not train)(nn.Dense(4)(x))
        x = nn.MultiHeadAttention(2, dropout_rate=0.125, deterministic=not train)(x)
        x = jdrop.linen.SelfAttention(2, dropout_rate=0.5, deterministic=not train)(x)
        return jdrop.linen.Dropout(0.5, deterministic=not train)(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.flax_drop = nnx.Dropout(0.25, broadcast_dims=(1,), rngs=rngs)
        self.flax_attention, self.our_attention = (
            module.MultiHeadAttention(2, 4, dropout_rate=rate, decode=False, rngs=rngs)
            for module, rate in ((nnx, 0.125), (jdrop.nnx, 0.5))
        )
        self.our_drop = jdrop.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.our_drop(self.our_attention(self.flax_attention(self.flax_drop(x))))


@pytest.mark.filterwarnings("ignore:SelfAttention:DeprecationWarning")
@pytest.mark.parametrize(
    "model", [LinenBlock(), NnxBlock, NnxBlock(nnx.Rngs(0)), jdrop.linen.as_network(LinenBlock())],
    ids=["linen", "nnx class", "nnx", "network"],
)  # fmt: skip
def test_the_sites_of_a_sound_model_are_listed_without_faults(model):
    audit = jdrop.audit(model, INPUTS)
    assert audit.faults == ()
    described = [
        (site.kind, site.rate, site.shape, site.broadcast_dims, site.on_in_training,
         site.on_in_evaluation, site.shares_key_with, site.read_by)
        for site in audit.sites
    ]  # fmt: skip
    if isinstance(model, nn.Module | Network):
        first, second = "MultiHeadAttention_0", "SelfAttention_0"
    else:
        first, second = "flax_attention", "our_attention"
    read_by_all = tuple(f"{first}/{name}" for name in ("key", "query", "value"))
    assert described == [
        ("Flax", 0.25, (5, 7, 4), (1,), True, False, (), read_by_all),
        ("Flax", 0.125, (5, 2, 7, 7), (0, 1), True, False, (), (f"{first}/out",)),
        ("jdrop", 0.5, (5, 2, 7, 7), (), True, False, (), (f"{second}/out",)),
        ("jdrop", 0.5, (5, 7, 4), (), True, False, (), ("outputs",)),
    ]
    assert str(audit).endswith("\n\nNo faults.")


def test_a_model_without_dropout_drops_nothing():
    assert str(jdrop.audit(nn.Dense(2), INPUTS)) == "No dropout.\n\nNo faults."


class TutorialBlock(nnx.Module):
    """Its mode is an argument that is off by default."""

    def __init__(self, rngs):
        self.linear, self.drop = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, training=False):
        return self.drop(self.linear(x), deterministic=not training)


class ForgotToPassItOn(nnx.Module):
    """A model that takes the mode and does not give it to its blocks."""

    def __init__(self, rngs):
        self.blocks = nnx.List([TutorialBlock(rngs) for _ in range(2)])

    def __call__(self, x, training=False):
        for block in self.blocks:
            x = block(x)
        return x


class NeverOn(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = jdrop.linen.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=True)(x)
        return nn.Dropout(0.1, deterministic=True)(x) + nn.Dropout(0.0, deterministic=True)(x)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (ForgotToPassItOn, "blocks/0/drop and blocks/1/drop"),
        # A rate of 0 is meant.
        (NeverOn(), "MultiHeadDotProductAttention_0 and Dropout_0"),
    ],
    ids=["mode not passed on", "switched off"],
)
def test_a_layer_that_no_mode_reaches_is_never_on(model, layers):
    assert list(jdrop.audit(model, INPUTS).faults) == [NEVER.format(layers)]


class AlwaysOn(nn.Module):
    """As in reinforcement learning with an always noisy critic."""

    @nn.compact
    def __call__(self, x, train=False):
        x = jdrop.linen.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))
        x = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False)(x)
        return nn.Dropout(0.5, deterministic=train)(x)


def test_a_layer_that_is_on_in_evaluation_is_a_fault():
    audit = jdrop.audit(AlwaysOn(), INPUTS)
    assert list(audit.faults) == [
        ALWAYS.format("Dropout_0 and MultiHeadDotProductAttention_0"),
        "On in evaluation only, so the mode is inverted: Dropout_1.",
    ]


class OwnMask(nn.Module):
    """A copy of Dropout, as some code bases keep one."""

    rate: float
    deterministic: bool = False

    @nn.compact
    def __call__(self, x):
        if self.deterministic:
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0)


class HandWritten(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = OwnMask(0.5, deterministic=not train)(x)
        if train:
            x = jdrop.dropout(self.make_rng("dropout"), x, 0.5)
            x = x + jax.random.normal(self.make_rng("noise"), (1, 1, 4))
        return x


def test_masks_drawn_by_hand_are_listed_with_their_lines():
    audit = jdrop.audit(HandWritten(), INPUTS)
    assert [(site.kind, site.shape) for site in audit.sites] == [
        ("hand-written", (5, 7, 4)),
        ("hand-written", None),
        ("hand-written", (1, 1, 4)),
    ]
    assert all(site.on_in_training and site.on_in_evaluation is False for site in audit.sites)
    assert without_lines(audit) == [BY_HAND.format("OwnMask_0 (line), line and line")]


def test_the_line_of_a_draw_is_its_own_although_jax_has_traced_the_same_draw_before():
    def draw(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 0.5, (3, 1, 2))

    def draw_elsewhere(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 0.5, (3, 1, 2))

    first, second = (
        read_draws(function, jax.random.key(0)).draws[0] for function in (draw, draw_elsewhere)
    )
    lines = [int(found.line.removeprefix("test_audit.py:")) for found in (first, second)]
    starts = [function.__code__.co_firstlineno for function in (draw, draw_elsewhere)]
    assert lines == [start + 1 for start in starts]


class AlwaysOnByHand(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = OwnMask(0.5)(x)
        return jdrop.linen.Dropout(0.5, deterministic=not train)(x)


def test_a_hand_written_mask_that_is_always_on_stops_the_evaluation_of_linen():
    audit = jdrop.audit(AlwaysOnByHand(), INPUTS)
    assert [site.on_in_evaluation for site in audit.sites] == [False, None, None]
    assert without_lines(audit) == [
        BY_HAND.format("OwnMask_0 (line)"),
        'An evaluation draws, and has no key: OwnMask_0 needs PRNG for "dropout".',
    ]


class OneKeyForAll(nnx.Module):
    """A network that draws one key and hands it to all its blocks."""

    def __init__(self, rngs):
        self.rngs = nnx.Rngs(dropout=rngs.dropout())
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.drop = jdrop.nnx.Dropout(0.5)
        self.own = jdrop.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=False):
        key = self.rngs.dropout()
        for layer in self.layers:
            x = self.drop(layer(x), rngs=key, deterministic=not train)
            if train:
                x = x * jax.random.bernoulli(key, 0.5, (5, 1, 1))
        return self.own(x, deterministic=not train)


def test_one_key_for_all_blocks_is_a_fault():
    audit = jdrop.audit(OneKeyForAll, INPUTS)
    sharing = [site for site in audit.sites if site.shares_key_with]
    assert len(sharing) == 4
    assert [site.name for site in audit.sites if not site.shares_key_with] == ["own"]
    assert sharing[0].shares_key_with == tuple(site.name for site in sharing[1:])
    assert without_lines(audit)[0] == SAME_KEY.format("drop, drop #2, line and line #2")


class Turn(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = jdrop.linen.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))
        return nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False)(x), None


class Scanned(nn.Module):
    split: bool

    @nn.compact
    def __call__(self, x):
        turn = nn.scan(
            nn.remat(Turn, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": self.split},
            length=3,
        )
        return turn(name="turn")(x, None)[0]


@pytest.mark.parametrize("split", [True, False])
def test_one_key_for_all_turns_of_a_scan_is_a_fault(split):
    """A site in a loop is listed once, although JAX traces the body of a loop several times."""
    audit = jdrop.audit(Scanned(split), INPUTS)
    layers = ["turn/Dropout_0", "turn/MultiHeadDotProductAttention_0"]
    assert names(audit) == layers
    in_loop = [fault for fault in audit.faults if "loop" in fault]
    assert in_loop == ([] if split else [ONE_KEY_IN_LOOP.format(" and ".join(layers))])


class ConstantKey(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        drop = nn.Dropout(0.5, deterministic=not train)
        x = drop(x, rng=jax.random.key(0))
        return jdrop.linen.Dropout(0.5, deterministic=not train)(x)


def test_a_key_that_is_the_same_in_every_pass_is_a_fault():
    audit = jdrop.audit(ConstantKey(), INPUTS)
    assert list(audit.faults) == ["A key that is the same in every pass: Dropout_0."]


def test_while_loops_branches_and_maps_are_followed(getkey):
    def function(key: jax.Array, x: jax.Array) -> Any:
        first, second, third = jax.random.split(key, 3)

        def turn(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            i, y = carry
            y = y + jax.random.uniform(first) + jax.random.normal(jax.random.fold_in(first, i))
            return i + 1, y

        _, y = jax.lax.while_loop(lambda carry: carry[0] < 5, turn, (0, x))
        z = jax.lax.cond(x > 0, lambda: jax.random.uniform(second), lambda: 0.0)
        w = jax.vmap(lambda key: jax.random.uniform(key))(jax.random.split(third, 4))
        return y, z, w

    draws = read_draws(function, getkey(), jnp.float32(1)).draws
    assert [draw.num_turns for draw in draws] == [None, 1, 1, 1]
    assert len({draw.key for draw in draws}) == 4
    assert not any(draw.is_constant for draw in draws)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="network must be a Network, a module or a function"):
        jdrop.audit(3, INPUTS)
    with pytest.raises(TypeError, match="call its class first"):
        jdrop.audit(LinenBlock, INPUTS)


class LinenBranches(nn.Module):
    """Stochastic depth, with statistics of a batch that no pass updates."""

    @nn.compact
    def __call__(self, x, train=False):
        linear = nn.Dense(4)
        x += jdrop.linen.DropPath(0.25, deterministic=not train)(x, branch=lambda x: linear(x))
        x += jdrop.linen.DropPath(0.5, per_sample=False, deterministic=not train)(x)
        return nn.BatchNorm(use_running_average=True)(x)


class NnxBranches(nnx.Module):
    def __init__(self, rngs):
        self.DropPath_0 = jdrop.nnx.DropPath(0.25, rngs=rngs)
        self.DropPath_1 = jdrop.nnx.DropPath(0.5, per_sample=False, rngs=rngs)
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x += self.DropPath_0(x, branch=self.linear)
        return x + self.DropPath_1(x)


@pytest.mark.parametrize("model", [LinenBranches(), NnxBranches], ids=["linen", "nnx"])
def test_dropped_branches_are_places_whose_axes_are_those_of_a_sample_or_of_the_batch(model):
    found = jdrop.audit(model, INPUTS)
    assert names(found) == ["DropPath_0", "DropPath_1"]
    assert [site.rate for site in found.sites] == [0.25, 0.5]
    assert [site.broadcast_dims for site in found.sites] == [(1, 2), (0, 1, 2)]
    assert all(site.kind == "jdrop" and site.on_in_training for site in found.sites)
    assert found.faults == ()


def test_a_model_that_as_network_refuses_is_audited():
    inputs = jnp.ones(INPUTS.shape)
    with pytest.raises(ValueError, match="the batch statistics of the network stay as they are"):
        jdrop.linen.as_network(LinenBranches()).init(jax.random.key(0), inputs)
    assert len(jdrop.audit(LinenBranches(), inputs).sites) == 2


# What reads a site.


class Reads(nn.Module):
    """Dropout before a residual connection, two heads, and a mask that is off in training."""

    @nn.compact
    def __call__(self, x, train):
        def drop(x, rate, name):
            return jdrop.linen.Dropout(rate, deterministic=not train, name=name)(x)

        x = drop(x, 0.1, "inputs")
        x = x + drop(nn.Dense(4, name="branch")(x), 0.2, "residual")
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = drop(nn.relu(x) + 1, 0.3, "shared")
        kernel = self.param("kernel", nn.initializers.ones, (4, 3))
        kernel = drop(kernel.astype(jnp.bfloat16), 0.4, "connections").astype(x.dtype)
        first, second = nn.Dense(2, name="first")(x), nn.remat(nn.Dense)(2, name="second")(x)
        if train:
            first = first * jax.random.bernoulli(self.make_rng("dropout"), 0.5, first.shape)
        off = nn.Dropout(0.5, deterministic=True, name="off")(x @ kernel)
        return drop(second, 0.5, "logits"), nn.Dense(1, name="last")(first), off


@pytest.mark.slow
def test_the_layers_that_read_a_site_are_the_next_ones_with_weights():
    audit = jdrop.audit(Reads(), INPUTS)
    assert {site.name: site.read_by for site in audit.sites if site.kind == "jdrop"} == {
        "inputs": ("branch", "norm"),
        "residual": ("norm",),
        "shared": ("first", "kernel", "second"),
        "connections": ("kernel",),
        "logits": ("outputs",),
    }
    off, by_hand = [site for site in audit.sites if site.kind != "jdrop"]
    assert (by_hand.kind, by_hand.read_by) == ("hand-written", ("last",))
    assert (off.name, off.read_by) == ("off", ("outputs",))


def test_the_next_turn_of_a_scan_reads_what_the_last_layer_of_a_turn_drops():
    class Turn(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.Dense(4, name="first")(x)
            x = jdrop.linen.Dropout(0.5, deterministic=False)(x)
            x = nn.Dense(4, name="second")(x)
            return jdrop.linen.Dropout(0.5, deterministic=False)(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            turns = nn.scan(
                Turn, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
                length=3,
            )(name="turns")  # fmt: skip
            return nn.Dense(2, name="head")(turns(x, None)[0])

    audit = jdrop.audit(Net(), INPUTS)
    assert [site.read_by for site in audit.sites] == [("turns/second",), ("head", "turns/first")]


def test_while_loops_and_branches_are_followed_to_what_reads_a_draw(getkey):
    def function(weights: Any, key: jax.Array, x: jax.Array) -> jax.Array:
        def turn(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            i, x = carry
            x = x * weights["turn"]
            return i + 1, x + jax.random.uniform(jax.random.fold_in(key, i))

        _, x = jax.lax.while_loop(lambda carry: carry[0] < 5, turn, (0, x))
        return jax.lax.cond(x > 0, lambda: x * weights["branch"], lambda: x)

    weights = {"branch": jnp.ones(()), "turn": jnp.ones(())}
    (draw,) = read_draws(function, weights, getkey(), jnp.float32(1), weights=list(weights)).draws
    assert draw.read_by == ("branch", "outputs", "turn")
