"""Which weights are first-layer weights, and how they become tiles."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdrop.linen
import jdrop.nnx
from jdrop.study.first_layer import first_layer_tiles
from jdrop.study.models import MLP


def as_images(x):
    return x.reshape(len(x), 8, 8, 1)


def channels_first_and_back(x):
    return x.reshape(len(x), 1, 8, 8).transpose(0, 2, 3, 1)


class CNN(nn.Module):
    """Its last layer has as many rows as there are pixels: the wrong one to show."""

    kernel: tuple[int, ...] = (3, 3)
    prepare: object = as_images

    @nn.compact
    def __call__(self, x, train):
        x = self.prepare(x)
        x = nn.relu(nn.Conv(5, self.kernel, name="z_first")(x))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        x = nn.relu(nn.Dense(64, name="middle")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="a_head")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.a_head = nnx.Linear(64, 10, rngs=rngs)
        self.conv = nnx.Conv(1, 64, (8, 8), padding="VALID", rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.conv(as_images(x))))
        return self.a_head(x.reshape(len(x), -1))


class Standardised(nn.Module):
    """A module whose first layer reads the inputs after `prepare`."""

    prepare: object
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(self.layer(self.prepare(x)))


def tiles_and_params(network, inputs):
    variables = network.init(jax.random.key(0), inputs)
    return first_layer_tiles(network, variables, inputs), variables["params"]


FLAT = jnp.ones((3, 64))
IMAGES = jnp.ones((3, 8, 8, 1))


@pytest.mark.parametrize("prepare", [as_images, channels_first_and_back])
def test_a_cnn_shows_its_filters_and_not_its_last_layer(prepare):
    tiles, params = tiles_and_params(jdrop.linen.as_network(CNN(prepare=prepare)), FLAT)
    kernel = np.asarray(params["z_first"]["kernel"])  # [height, width, channel, filter]
    np.testing.assert_array_equal(tiles, kernel[:, :, 0].reshape(9, 5).T)


def test_each_channel_of_a_filter_is_a_tile():
    network = jdrop.linen.as_network(CNN(prepare=jnp.asarray))
    tiles, params = tiles_and_params(network, jnp.ones((3, 8, 8, 2)))
    kernel = np.asarray(params["z_first"]["kernel"])
    assert tiles.shape == (10, 9)
    for index, tile in enumerate(tiles):
        np.testing.assert_array_equal(tile.reshape(3, 3), kernel[:, :, index % 2, index // 2])


def test_an_nnx_network_shows_its_filters():
    network = jdrop.nnx.as_network(NnxNet)
    variables = network.init(jax.random.key(0), FLAT)
    tiles = first_layer_tiles(network, variables, FLAT)
    (kernel,) = (leaf for leaf in jax.tree.leaves(variables) if leaf.shape == (8, 8, 1, 64))
    np.testing.assert_array_equal(tiles, np.asarray(kernel).reshape(64, 64).T)


def test_an_mlp_shows_the_weights_into_its_units():
    module = MLP(hidden=(64, 64), num_outputs=3, input_rate=0.2)
    tiles, params = tiles_and_params(jdrop.linen.as_network(module), FLAT)
    np.testing.assert_array_equal(tiles, np.asarray(params["Dense_0"]["kernel"]).T)


@pytest.mark.parametrize(
    "prepare", [lambda x: (x - 0.5) / 2, lambda x: jnp.clip(x, 0, 1), jax.jit(lambda x: 2 * x)]
)
def test_standardised_pixels_are_still_pixels(prepare):
    module = Standardised(prepare, nn.Dense(4))
    network = jdrop.linen.as_network(module, has_dropout=False)
    tiles, params = tiles_and_params(network, FLAT)
    np.testing.assert_array_equal(tiles, np.asarray(params["layer"]["kernel"]).T)


@pytest.mark.parametrize("inputs", [FLAT, IMAGES])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_that_sums_over_rows_columns_and_channels_is_one_of_units(inputs, dtype):
    module = Standardised(as_images, nn.DenseGeneral(4, axis=(1, 2, 3), dtype=dtype))
    network = jdrop.linen.as_network(module, has_dropout=False)
    tiles, params = tiles_and_params(network, inputs)
    np.testing.assert_array_equal(tiles, np.asarray(params["layer"]["kernel"]).reshape(64, 4).T)


NOT_SHOWN = {
    "columns of a table": (MLP(hidden=(16,), num_outputs=3), jnp.ones((3, 16))),
    "65 inputs": (MLP(hidden=(65,), num_outputs=3), jnp.ones((3, 65))),
    "filters of one pixel": (CNN(kernel=(1, 1)), FLAT),
    "filters of 3 x 5": (CNN(kernel=(3, 5)), FLAT),
    "filters along one axis": (
        Standardised(lambda x: x[:, :, None], nn.Conv(4, (4,))),
        FLAT,
    ),
    "patches": (Standardised(lambda x: x.reshape(3, 4, 16), nn.Dense(4)), FLAT),
    "reversed": (Standardised(lambda x: x[:, ::-1], nn.Dense(4)), FLAT),
    "columns first": (
        Standardised(lambda x: x.reshape(3, 8, 8).mT.reshape(3, 64), nn.Dense(4)),
        FLAT,
    ),
    "some pixels": (Standardised(lambda x: x[:, :49], nn.Dense(4)), FLAT),
    "a fixed matrix": (Standardised(lambda x: x @ np.eye(64, dtype="f"), nn.Dense(4)), FLAT),
    "products of examples": (Standardised(lambda x: x @ x.T, nn.Dense(4)), FLAT),
    "an embedding": (Standardised(lambda x: x.astype(int), nn.Embed(2, 3)), FLAT),
    "computed weights": (Standardised(jnp.asarray, nn.WeightNorm(nn.Dense(4))), FLAT),
}


@pytest.mark.parametrize("case", NOT_SHOWN)
def test_weights_that_are_no_images_are_not_shown(case):
    module, inputs = NOT_SHOWN[case]
    network = jdrop.linen.as_network(module, has_dropout=False)
    tiles, _ = tiles_and_params(network, inputs)
    assert tiles is None
