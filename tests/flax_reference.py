"""Flax's own dropout layers as the reference, with masks that jdrop draws."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import pytest

import jdrop


@contextmanager
def flax_drawing_our_bits() -> Iterator[None]:
    """Makes `flax.linen.Dropout` and `flax.nnx.Dropout` draw their masks as jdrop does.

    A layer adds its mode, its keys under each transformation, and the scale. If these agree too,
    the outputs are equal bit for bit at rate 0.5, where the scale is exact.
    """

    def bernoulli(
        key: jax.Array, p: float, shape: Sequence[int], out_sharding: object = None
    ) -> jax.Array:
        return jdrop.keep_mask(key, shape, 1 - p)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("flax.linen.stochastic", "flax.nnx.nn.stochastic"):
            patch.setattr(f"{module}.random", SimpleNamespace(bernoulli=bernoulli))
        yield
