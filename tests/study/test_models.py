"""Networks made of a user's model: plain, with fixed masks, at any rate and width."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdrop.linen
import jdrop.nnx
from jdrop.study.data import Dataset
from jdrop.study.methods import separate_masks
from jdrop.study.models import FIXED_MASKS, MLP, Model, ModelError, check_model
from jdrop.study.sweeps import check_sweep

pytestmark = pytest.mark.grid

X = jax.random.normal(jax.random.key(0), (12, 5))


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rate: float = 0.5, width_factor: float = 1.0) -> None:
        units = round(10 * width_factor)
        self.hidden = nnx.Linear(5, units, rngs=rngs)
        self.drop = jdrop.nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(units, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.drop(nnx.relu(self.hidden(x))))


def linen_model(rate=0.5, width_factor=1.0):
    return MLP((10,), 3, rate, 0.0, width_factor)


MODELS = {"linen": Model(linen_model), "nnx": Model(NnxNet)}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def test_the_signature_of_the_factory_says_what_can_be_changed():
    assert MODELS["linen"].changeable == MODELS["nnx"].changeable == {"rate", "width_factor"}
    assert Model(MLP((4,), 3)).changeable == frozenset()


def test_the_plain_network_draws_nothing_and_equals_the_network_without_a_key(model):
    variables = model.plain.init(jax.random.key(1), X)
    with_key = model.plain(variables, X, jax.random.key(2))
    np.testing.assert_array_equal(with_key, model.dropout(variables, X, None))
    trained, _ = model.plain.apply_train(variables, X, jax.random.key(2))
    np.testing.assert_array_equal(trained, with_key)
    assert not np.array_equal(with_key, model.dropout(variables, X, jax.random.key(2)))


def test_a_network_at_a_rate_drops_at_that_rate(model):
    """In linen one network serves all rates; its variables hold the rate."""
    drawn = {}
    for rate in (0.0, 0.2, 0.5):
        network, holds_rate = model.at_rate(rate, X)
        assert holds_rate == (model is MODELS["linen"])
        variables = network.init(jax.random.key(1), X)
        if holds_rate:
            variables["rate"] = jnp.asarray(rate)
        drawn[rate] = network(variables, X, jax.random.key(2))
    rest = {name: value for name, value in variables.items() if name != "rate"}
    np.testing.assert_allclose(drawn[0.0], model.dropout(rest, X, None), rtol=1e-5, atol=1e-6)
    assert not np.allclose(drawn[0.2], drawn[0.5])


def test_training_leaves_the_rate_in_the_variables():
    network, _ = MODELS["linen"].at_rate(0.2, X)
    variables = {**network.init(jax.random.key(1), X), "rate": jnp.asarray(0.2)}
    _, updated = network.apply_train(variables, X, jax.random.key(2))
    assert updated["rate"] == variables["rate"]


def test_a_fixed_mask_belongs_to_the_network_and_serves_all_examples(model):
    network = model.masked(None)
    variables = network.init(jax.random.key(1), X)
    ((name, mask),) = variables[FIXED_MASKS].items()
    assert mask.shape == (10,)
    rest = {key: value for key, value in variables.items() if key != FIXED_MASKS}
    by_hand = model.dropout.replace_dropout(lambda site, units: units * mask[None])
    np.testing.assert_allclose(network(variables, X, None), by_hand(rest, X, None), rtol=1e-6)
    np.testing.assert_array_equal(
        network(variables, X, None), network(variables, X, jax.random.key(5))
    )
    other = network.init(jax.random.key(7), X)[FIXED_MASKS][name]
    assert not np.array_equal(mask, other)


def test_masks_of_masksembles_keep_equally_many_units_and_cover_every_unit(model):
    network = model.masked(3)
    variables = network.init(jax.random.key(1), X)
    ((name, masks),) = variables[FIXED_MASKS].items()
    assert masks.shape == (3, 10)
    assert masks.any(0).all()
    np.testing.assert_array_equal(masks.sum(1), [5, 5, 5])
    outputs = network(variables, X, None)
    separate = separate_masks(jax.tree.map(lambda leaf: np.asarray(leaf)[None], variables), 1)
    for index in range(3):
        single = jax.tree.map(lambda leaf, index=index: leaf[index], separate)
        np.testing.assert_array_equal(single[FIXED_MASKS][name], masks[index])
        for masked in (network, model.masked(None)):
            alone = masked(single, X, None)
            np.testing.assert_allclose(alone[index::3], outputs[index::3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.3, 1.0, 4.0])
def test_the_width_is_the_largest_within_the_parameters(model, share):
    target = share * model.num_parameters(X[:1])
    factor = model.width_for(target, X[:1])
    assert model.num_parameters(X[:1], width_factor=factor) <= target
    one_more = (round(10 * factor) + 1) / 10
    assert model.num_parameters(X[:1], width_factor=one_more) > target


def test_anything_but_a_module_or_its_factory_is_refused():
    with pytest.raises(ModelError, match="is an nnx module, NnxNet; give its class"):
        Model(NnxNet(nnx.Rngs(0)))
    with pytest.raises(ModelError, match="must be a linen module, or a class or function"):
        Model(3)
    with pytest.raises(ModelError, match="a parameter 'units' without a default"):
        Model(lambda units: MLP((units,), 3))
    with pytest.raises(ModelError, match=r"must make a linen module.*got int"):
        Model(lambda: 3).plain  # noqa: B018


def dataset(num_classes=3):
    inputs = np.asarray(X)
    labels = np.arange(12, dtype=np.int32) % 3
    if num_classes is None:
        return Dataset("x", inputs, labels.astype(np.float32), inputs, labels / 3, None)
    return Dataset("x", inputs, labels, inputs, labels, num_classes)


def test_a_model_that_does_not_fit_the_data_is_refused():
    check_model(Model(linen_model), dataset())
    with pytest.raises(ModelError, match=r"outputs of shape \(12, 4\) .* got \(12, 3\)"):
        check_model(Model(linen_model), dataset(4))
    with pytest.raises(ModelError, match=r"\(12,\) or \(12, 1\)"):
        check_model(Model(linen_model), dataset(None))
    with pytest.raises(ModelError, match=r"cannot take inputs of shape \(5,\)"):
        check_model(Model(nn.Sequential([nn.ConvTranspose(3, (3, 3)), nn.Dense(3)])), dataset())


def test_a_width_factor_without_effect_is_refused():
    with pytest.raises(ModelError, match="gives no more parameters"):
        Model(lambda width_factor=1.0: MLP((4,), 3)).width_for(10_000, X[:1])


class ExitingNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        raise SystemExit("no weights")


def test_a_model_that_exits_is_refused():
    with pytest.raises(ModelError, match="SystemExit: no weights"):
        check_model(Model(ExitingNet()), dataset())


def test_a_model_that_draws_no_mask_is_refused():
    for without_masks in (nn.Dense(3), lambda: linen_model(rate=0.0)):
        with pytest.raises(ModelError, match="draws no mask"):
            check_model(Model(without_masks), dataset())


class OwnDropPath(nn.Module):
    """A branch that the module drops itself, with or without jdrop's layer."""

    drop_path: nn.Module | None = None

    @nn.compact
    def __call__(self, x, train):
        branch = nn.Dense(5)(jdrop.linen.Dropout(0.5)(x, deterministic=not train))
        if self.drop_path is not None:
            return nn.Dense(3)(x + self.drop_path(branch, deterministic=not train))
        if train:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 0.8, (len(x), 1))
            branch = branch * keep / 0.8
        return nn.Dense(3)(x + branch)


class OwnNnxDropPath(NnxNet):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.rngs, self.deterministic = rngs, False

    def __call__(self, x: jax.Array) -> jax.Array:
        x = super().__call__(x)
        if self.deterministic:
            return x
        return x * jax.random.bernoulli(self.rngs.dropout(), 0.8, (len(x), 1)) / 0.8


class OwnAttention(nn.Module):
    """Drops attention weights by Flax's function, in place of a layer of attention."""

    uses_layer: bool

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x[..., None])
        x = jdrop.linen.Dropout(0.1)(x, deterministic=not train)
        if self.uses_layer:
            x = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1)(x, deterministic=not train)
        else:
            heads = x[..., None, :]
            key = self.make_rng("dropout") if train else None
            x = nn.dot_product_attention(
                heads, heads, heads, dropout_rng=key, dropout_rate=0.1, deterministic=not train
            )[..., 0, :]
        return nn.Dense(3)(x.mean(1))


@pytest.mark.parametrize(
    ("own", "place"),
    [
        (OwnDropPath(), "OwnDropPath.*test_models.py:"),
        (OwnNnxDropPath, "test_models.py:"),
        (OwnAttention(uses_layer=False), "OwnAttention.*test_models.py:"),
    ],
)
def test_a_model_whose_plain_network_still_draws_masks_is_refused(own, place):
    message = f"must draw nothing.*a key is consumed at .*{place}.*DropPath of jdrop.linen"
    with pytest.raises(ModelError, match=message):
        check_model(Model(own), dataset())


@pytest.mark.parametrize(
    "with_layers", [OwnDropPath(jdrop.linen.DropPath(0.2)), OwnAttention(uses_layer=True)]
)
def test_a_model_that_drops_with_layers_alone_is_accepted(with_layers):
    check_model(Model(with_layers), dataset())


def test_a_model_whose_head_is_zero_at_first_is_accepted():
    class ZeroHead(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = jdrop.linen.Dropout(0.5)(nn.Dense(4)(x), deterministic=not train)
            return nn.Dense(3, kernel_init=nn.initializers.zeros)(x)

    check_model(Model(ZeroHead()), dataset())


def test_a_sweep_of_values_that_the_model_or_data_does_not_allow_is_refused():
    check_sweep({"rate": [0.1, 0.5], "train_size": [2, 12]}, Model(linen_model), dataset())
    with pytest.raises(ModelError, match="rate cannot be swept"):
        check_sweep({"rate": [0.1]}, Model(MLP((4,), 3)), dataset())
    for name, value in (("label_noise", 1.0), ("train_size", 13.0), ("train_size", 1.0)):
        with pytest.raises(ModelError, match=f"values of {name} to sweep must lie in"):
            check_sweep({name: [value]}, Model(linen_model), dataset())
    with pytest.raises(ModelError, match=r"values of rate to sweep must lie in \[0, 1\), got 1.5"):
        check_sweep({"rate": [0.1, 1.5]}, Model(linen_model), dataset())
