"""The networks of the studies in `real_models.py`, each at a size that two CPU cores train."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import Array

import jdrop
import jdrop.linen
import jdrop.nnx

NUM_IMAGE_CLASSES = 10


class CNN(nnx.Module):
    """Two convolutions with batch normalisation, and dropout before the last layer."""

    def __init__(self, rngs: nnx.Rngs, rate: float = 0.5) -> None:
        self.convolutions = nnx.List(
            nnx.Conv(*channels, (3, 3), strides=2, use_bias=False, rngs=rngs)
            for channels in ((1, 16), (16, 32))
        )
        self.norms = nnx.List(
            nnx.BatchNorm(channels, momentum=0.9, rngs=rngs) for channels in (16, 32)
        )
        self.hidden = nnx.Linear(7 * 7 * 32, 64, rngs=rngs)
        self.dropout = jdrop.nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(64, NUM_IMAGE_CLASSES, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Logits `[batch, class]` of images `[batch, 28, 28, 1]`."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        return self.out(self.dropout(nnx.relu(self.hidden(x.reshape(len(x), -1)))))


class ResNet(nn.Module):
    """ResNet-8: a block at each of three resolutions, with dropout between its convolutions.

    This is where wide residual networks drop: Zagoruyko and Komodakis 2016, arXiv:1605.07146.
    """

    rate: float = 0.3
    channels: tuple[int, ...] = (8, 16, 32)

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Logits `[batch, class]` of images `[batch, 28, 28, 1]`."""

        def convolve(x: Array, channels: int, stride: int = 1, size: int = 3) -> Array:
            return nn.Conv(channels, (size, size), stride, use_bias=False)(x)

        def normalise(x: Array) -> Array:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        # The first layer already halves the resolution, for speed.
        x = nn.relu(normalise(convolve(images, self.channels[0], stride=2)))
        for index, channels in enumerate(self.channels):
            stride = 1 if index == 0 else 2
            y = nn.relu(normalise(convolve(x, channels, stride)))
            y = jdrop.linen.Dropout(self.rate, deterministic=not train)(y)
            y = normalise(convolve(y, channels))
            if stride > 1:
                x = normalise(convolve(x, channels, stride, size=1))
            x = nn.relu(x + y)
        return nn.Dense(NUM_IMAGE_CLASSES)(x.mean((1, 2)))


class ViT(nn.Module):
    """A vision transformer with stochastic depth and a head of zeros, as public ones have it."""

    rate: float = 0.2
    depth: int = 3
    width: int = 32

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Logits `[batch, class]` of images `[batch, 28, 28, 1]`."""
        x = nn.Conv(self.width, (7, 7), 7, padding="VALID")(images)
        x = x.reshape(len(x), -1, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + positions
        for rate in jdrop.depth_linear_rates(self.rate, num_layers=self.depth):

            def drop_path(branch: Array, rate: float = rate) -> Array:
                return jdrop.linen.DropPath(rate, deterministic=not train)(branch)

            x = x + drop_path(nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x)))
            y = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
            x = x + drop_path(nn.Dense(self.width)(y))
        x = nn.LayerNorm()(x).mean(1)
        return nn.Dense(NUM_IMAGE_CLASSES, kernel_init=nn.initializers.zeros)(x)


class TextClassifier(nn.Module):
    """An LSTM that reads words, with dropout of its inputs and of the mean of its outputs."""

    vocabulary: int
    num_classes: int
    rate: float = 0.5
    width: int = 32

    @nn.compact
    def __call__(self, tokens: Array, lengths: Array, train: bool) -> Array:
        """Logits `[batch, class]` of words `[batch, length]`, of which `lengths` are there."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = jdrop.linen.Dropout(self.rate, deterministic=not train)(x)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x, seq_lengths=lengths)
        is_word = (jnp.arange(tokens.shape[1])[None] < lengths[:, None])[..., None]
        mean = jnp.where(is_word, x, 0).sum(1) / lengths[:, None]
        mean = jdrop.linen.Dropout(self.rate, deterministic=not train)(mean)
        return nn.Dense(self.num_classes)(mean)


class CharacterModel(nn.Module):
    """A transformer that predicts the next character, with dropout as GPT-2 has it."""

    vocabulary: int
    rate: float = 0.1
    depth: int = 2
    width: int = 32

    @nn.compact
    def __call__(self, tokens: Array, train: bool) -> Array:
        """Logits `[batch, length, character]` from characters `[batch, length]`."""

        def drop(x: Array) -> Array:
            return jdrop.linen.Dropout(self.rate, deterministic=not train)(x)

        x = nn.Embed(self.vocabulary, self.width)(tokens)
        positions = nn.initializers.normal(0.02)
        x = drop(x + self.param("positions", positions, (1, *x.shape[1:])))
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.depth):
            attention = jdrop.linen.MultiHeadDotProductAttention(
                2, dropout_rate=self.rate, deterministic=not train
            )
            x = x + drop(attention(nn.LayerNorm()(x), mask=mask))
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + drop(nn.Dense(self.width)(y))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class DeepSets(nn.Module):
    """Sums a network of each point over the set, whose order does not matter.

    Zaheer et al. 2017, arXiv:1703.06114; the network of a point reads sines of its coordinates, see
    Tancik et al. 2020, arXiv:2006.10739.
    """

    rate: float = 0.3
    width: int = 64

    @nn.compact
    def __call__(self, points: Array, mask: Array, train: bool) -> Array:
        """Logits `[batch, class]` of points `[batch, point, coordinate]`.

        Args:
            points: the coordinates; any numbers stand where there is no point.
            mask: `[batch, point]`, True where there is a point.
            train: whether units are dropped.
        """
        angles = jnp.pi * points[..., None] * jnp.array([0.5, 1, 2]).reshape(1, 1, 1, 3)
        angles = angles.reshape(*points.shape[:2], -1)
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        x = nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(x)))
        x = jnp.where(mask[..., None], x, 0).sum(1) / 10  # The sum of about 33 points.
        x = jdrop.linen.Dropout(self.rate, deterministic=not train)(nn.relu(x))
        x = nn.relu(nn.Dense(self.width)(x))
        x = jdrop.linen.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(NUM_IMAGE_CLASSES)(x)
