"""A swap: jdrop's layers in place of Flax's, in models that were not written for them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop.network import dropout_sites, record_masks


class Block(nn.Module):
    """Compact, with dropout, attention and a layer that is called twice."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(self.rate)(nn.Dense(4)(x), deterministic=not train)
        x = nn.MultiHeadDotProductAttention(2, dropout_rate=self.rate, deterministic=not train)(x)
        shared = nn.Dropout(self.rate, deterministic=not train)
        return shared(jnp.sin(shared(x)))


class InSetup(nn.Module):
    """Made in `setup`, with attention that has no dropout."""

    def setup(self):
        self.dense, self.drop = nn.Dense(4), nn.Dropout(0.5)
        self.attention = nn.SelfAttention(2, deterministic=True)

    def __call__(self, x, train=False):
        return self.attention(self.drop(self.dense(x), deterministic=not train))

    def encode(self, x, train=False):
        return self.drop(self.dense(x), deterministic=not train)


class Nested(nn.Module):
    """Lifted and given from outside."""

    body: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.remat(Block, static_argnums=2)(name="remat")(x, train)
        x = nn.jit(Block, static_argnames="train")(name="jit")(x, train=train)
        return self.body(x, train)


pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention:DeprecationWarning")

MODULES = {"compact": Block(), "setup": InSetup(), "nested": Nested(Block())}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_linen_parameters_stay_and_so_do_outputs_without_dropout(name, getkey):
    module, x, key = MODULES[name], jax.random.normal(getkey(), (2, 6, 4)), getkey()
    swapped = jdrop.linen.swap(module)
    variables = module.init(key, x)
    again = swapped.init(jax.random.clone(key), x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables, again))
    np.testing.assert_allclose(swapped.apply(variables, x), module.apply(variables, x), atol=1e-6)
    assert isinstance(swapped, type(module))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_linen_layers_become_those_of_jdrop(name):
    x = jnp.ones((2, 6, 4))
    before = jdrop.audit(MODULES[name], x).sites
    after = jdrop.audit(jdrop.linen.swap(MODULES[name]), x).sites
    assert {site.kind for site in before} == {"Flax"}
    assert {site.kind for site in after} == {"jdrop"}
    assert [(site.name, site.rate, site.shape, site.broadcast_dims) for site in after] == [
        (site.name, site.rate, site.shape, site.broadcast_dims) for site in before
    ]


class WithJdrop(nn.Module):
    """`Block` as it would be after a change of its imports."""

    @nn.compact
    def __call__(self, x, train=False):
        x = jdrop.linen.Dropout(0.5)(nn.Dense(4)(x), deterministic=not train)
        x = jdrop.linen.MultiHeadDotProductAttention(
            2, dropout_rate=0.5, deterministic=not train, broadcast_dropout=True
        )(x)
        shared = jdrop.linen.Dropout(0.5, deterministic=not train)
        return shared(jnp.sin(shared(x)))


def test_a_swapped_linen_module_draws_the_masks_of_changed_imports(getkey):
    x, key = jax.random.normal(getkey(), (2, 6, 4)), getkey()
    variables = Block().init(getkey(), x)
    expected, actual = (
        module.apply(variables, x, train=True, rngs={"dropout": jax.random.clone(key)})
        for module in (WithJdrop(), jdrop.linen.swap(Block()))
    )
    assert jnp.array_equal(actual, expected)


def test_a_swap_leaves_the_module_itself_as_it_was(getkey):
    module = nn.Sequential([nn.Dense(4), nn.Dropout(0.5, deterministic=False)])
    x, key = jnp.ones((2, 4)), getkey()
    variables = jdrop.linen.swap(module).init({"params": getkey(), "dropout": getkey()}, x)
    assert type(module.layers[1]) is nn.Dropout

    def outputs(module: nn.Module) -> jax.Array:
        return module.apply(variables, x, rngs={"dropout": jax.random.clone(key)})

    before = outputs(module)
    outputs(jdrop.linen.swap(module, rate=1.0))
    assert jnp.array_equal(outputs(module), before)


def test_other_methods_of_a_linen_module_are_swapped_too(getkey):
    x = jnp.ones((2, 6, 4))
    swapped = jdrop.linen.swap(InSetup(), rate=1.0)
    variables = swapped.init(getkey(), x)
    outputs = swapped.apply(variables, x, True, rngs={"dropout": getkey()}, method="encode")
    assert (outputs == 0).all()


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(x)


def test_swaps_of_one_module_do_not_share_programs_that_it_has_compiled(getkey):
    """`nn.jit` keeps programs, and must not use one for another swap."""
    module, x = nn.Sequential([nn.jit(Dropping)()]), jnp.ones((20, 4))
    zeros = [
        float((swapped.apply({}, x, rngs={"dropout": getkey()}) == 0).mean())
        for swapped in (
            module,
            jdrop.linen.swap(module, rate=1.0),
            jdrop.linen.swap(module, rate=0.0),
        )
    ]
    assert 0 < zeros[0] < 1
    assert zeros[1:] == [1, 0]


class NnxBlock(nnx.Module):
    """Dropout, attention and a list."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            2, 4, dropout_rate=0.5, decode=False, rngs=rngs, deterministic=False
        )
        self.other_attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

    def __call__(self, x):
        x = self.drops[0](self.linear(x))
        return self.drops[1](self.other_attention(self.attention(x)))


def test_an_nnx_model_is_changed_in_place_and_keeps_its_variables(getkey):
    model, x = NnxBlock(nnx.Rngs(getkey())), jax.random.normal(getkey(), (2, 6, 4))
    before, original = nnx.state(model), nnx.clone(model)
    assert jdrop.nnx.swap(model) is model
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(before)
    kinds = {
        name: type(layer).__module__
        for name, layer in nnx.iter_modules(model)
        if isinstance(layer, nnx.Dropout | nnx.MultiHeadAttention)
    }
    assert len(kinds) == 4
    assert set(kinds.values()) == {"jdrop.nnx"}
    model.eval()
    original.eval()
    np.testing.assert_allclose(model(x), original(x), atol=1e-6)


def test_a_swapped_nnx_model_draws_with_the_layers_of_jdrop(getkey):
    x, key = jnp.ones((2, 6, 4)), getkey()
    model = jdrop.nnx.swap(nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=key)))
    expected = jdrop.nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=jax.random.clone(key)))(x)
    assert jnp.array_equal(model(x), expected)
    sites = jdrop.audit(lambda rngs: jdrop.nnx.swap(NnxBlock(rngs)), x).sites
    assert [(site.name, site.kind) for site in sites] == [
        ("drops/0", "jdrop"),
        ("attention", "jdrop"),
        ("drops/1", "jdrop"),
    ]


def swap_linen(**options: Any) -> Any:
    return jdrop.linen.as_network(jdrop.linen.swap(Block(), **options))


def swap_nnx(**options: Any) -> Any:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        extra = {"rngs": rngs} if "after" in options else {}
        return jdrop.nnx.swap(NnxBlock(rngs), **options, **extra)

    return jdrop.nnx.as_network(make)


NAMES = {
    "linen": ["Dropout_0", "MultiHeadDotProductAttention_0", "Dropout_1", "Dropout_1 #2"],
    "nnx": ["drops/0", "attention", "drops/1"],
}


@pytest.fixture(params=["linen", "nnx"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def swapped(kind: str, **options: Any) -> Any:
    return (swap_linen if kind == "linen" else swap_nnx)(**options)


def rates(network: Any) -> dict[str, Any]:
    return {site.name: site.rate for site in jdrop.audit(network, jnp.ones((2, 6, 4))).sites}


def test_a_number_becomes_the_rate_of_every_layer_that_drops(kind):
    """Attention without dropout stays without."""
    assert rates(swapped(kind, rate=0.25)) == dict.fromkeys(NAMES[kind], 0.25)


@pytest.mark.slow
def test_a_function_chooses_rates_by_path_and_old_rate(kind):
    first, attention, *others = NAMES[kind]

    def choose(name: str, rate: float) -> float:
        assert rate == 0.5
        return {first: 0.0, attention: 0.125}.get(name, rate / 2)

    expected = {first: 0.0, attention: 0.125, **dict.fromkeys(others, 0.25)}
    network = swapped(kind, rate=choose)
    assert rates(network) == expected
    # The rate 0 is no fault, and the mask is that of the new rates.
    assert jdrop.audit(network, jnp.ones((2, 6, 4))).faults == ()


def test_replaced_and_recorded_sites_are_those_of_the_swap(kind, getkey):
    network, x = swapped(kind, rate=0.25), jnp.ones((2, 6, 4))
    variables = network.init(getkey(), x)
    assert {site.rate for site in dropout_sites(network, variables, x)} == {0.25}
    key = getkey()
    outputs, masks = record_masks(jax.random.clone(key), network, variables, x)
    assert jnp.array_equal(outputs, network(variables, x, key))
    assert len(masks) == 2


def test_dropout_is_added_after_named_layers_in_training_only(kind, getkey):
    layer = "Dense_0" if kind == "linen" else "linear"
    network, x = swapped(kind, rate=0.0, after={layer: 0.75}), jnp.ones((20, 6, 4))
    plain = swapped(kind, rate=0.0)
    audit = jdrop.audit(network, x)
    assert audit.faults == ()
    added = {site.name: site for site in audit.sites}[f"{layer}/added_dropout"]
    assert (added.rate, added.kind) == (0.75, "jdrop")
    assert (added.on_in_training, added.on_in_evaluation) == (True, False)

    variables, key = network.init(getkey(), x), getkey()
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(
        plain.init(getkey(), x)["params"]
    )
    assert jnp.array_equal(network(variables, x, None), plain(variables, x, None))
    _, masks = record_masks(key, network, variables, x)
    (mask,) = masks[f"{layer}/added_dropout"]
    assert abs(mask.mean() - 0.25) < 6 * np.sqrt(0.75 * 0.25 / mask.size)


class CalledTwice(nn.Module):
    def setup(self):
        self.dense = nn.Dense(4)

    def __call__(self, x):
        return self.dense(x), self.dense(x)


def test_added_dropout_draws_anew_at_each_call_of_a_shared_layer(getkey):
    module = jdrop.linen.swap(CalledTwice(), after={"dense": 0.5})
    x = jnp.ones((8, 4))
    variables = module.init(getkey(), x)
    first, second = module.apply(variables, x, rngs={"dropout": getkey()})
    assert not jnp.array_equal(first == 0, second == 0)
    again, _ = module.apply(variables, x)
    assert (again != 0).all()


class OwnCall(nn.Dropout):
    """A layer that is derived from Flax's and does something else."""

    @nn.compact
    def __call__(self, inputs, deterministic=None):
        return inputs + self.rate


def own_attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return v


def test_layers_of_the_user_keep_their_calls(getkey):
    x = jnp.ones((2, 6, 4))
    own = nn.Sequential([OwnCall(0.5)])
    assert (jdrop.linen.swap(own, rate=0.25).apply({}, x) == 1.25).all()
    attention = nn.MultiHeadDotProductAttention(2, attention_fn=own_attention)
    network = nn.Sequential([attention])
    variables = network.init(getkey(), x)
    actual = jdrop.linen.swap(network).apply(variables, x)
    assert jnp.array_equal(actual, network.apply(variables, x))
    model = nnx.MultiHeadAttention(
        2, 4, attention_fn=own_attention, decode=False, rngs=nnx.Rngs(getkey())
    )
    assert jdrop.nnx.swap(model).attention_fn is own_attention
    assert type(model) is nnx.MultiHeadAttention


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "class": (lambda: jdrop.linen.swap(Block), TypeError, "call its class first"),
    "nnx class": (lambda: jdrop.nnx.swap(NnxBlock), TypeError, "make it first"),
    "rate": (lambda: jdrop.linen.swap(Block(), rate=1.5), ValueError, r"must lie in \[0, 1\]"),
    "rate of attention": (
        lambda: rates(swap_linen(rate=1.0)),
        ValueError,
        r"the new rate of MultiHeadDotProductAttention_0 must lie in \[0, 1\)",
    ),
    "rate added": (
        lambda: jdrop.linen.swap(Block(), after={"Dense_0": -1.0}),
        ValueError,
        r"after\['Dense_0'\] must lie in",
    ),
    "name": (
        lambda: rates(swap_linen(after={"Dense_7": 0.5})),
        ValueError,
        "after names Dense_7, but the model has no such layer; it has Dense_0, Dropout_0",
    ),
    "nnx name": (
        lambda: rates(swap_nnx(after={"Dense_7": 0.5})),
        ValueError,
        "after names Dense_7, but the model has no such layer; it has attention, ",
    ),
    "no rngs": (
        lambda: jdrop.nnx.swap(NnxBlock(nnx.Rngs(0)), after={"linear": 0.5}),
        ValueError,
        "rngs must be given with after",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_a_module_inside_another_is_refused(getkey):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jdrop.linen.swap(Block())(x)

    with pytest.raises(ValueError, match="got one inside Outer; swap the outermost module"):
        Outer().init(getkey(), jnp.ones((2, 6, 4)))


def test_a_swapped_module_can_be_a_part_of_another(getkey):
    module = nn.Sequential(
        [nn.Dense(4), jdrop.linen.swap(nn.Sequential([nn.Dropout(0.5, deterministic=False)]))]
    )
    sites = jdrop.audit(module, jnp.ones((2, 4))).sites
    assert [(site.name, site.kind) for site in sites] == [("layers_1/layers_0", "jdrop")]
