"""Flax's own dropout layers as the reference, drawing the bits that jdrop draws."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import pytest

import jdrop


@contextmanager
def flax_drawing_our_bits() -> Iterator[None]:
    """Makes `flax.linen.Dropout` and `flax.nnx.Dropout` draw their masks as jdrop does.

    What is left to differ is all that a layer adds to the function: its mode, the key that it
    makes under each transformation, and the maths; so at rate 0.5, where scaling is exact, the
    outputs must be equal bit for bit.
    """

    def bernoulli(
        key: jax.Array, p: float, shape: Sequence[int], out_sharding: object = None
    ) -> jax.Array:
        return jdrop.keep_mask(key, shape, 1 - p)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("flax.linen.stochastic", "flax.nnx.nn.stochastic"):
            patch.setattr(f"{module}.random", SimpleNamespace(bernoulli=bernoulli))
        yield
