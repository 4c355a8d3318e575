"""Rates, dtypes, cases and comparisons that the tests of the functions share."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jdrop

clone = jax.random.clone


# The first five rates are exact in 1, 2, 2, 4 and 8 bits. The others need 16.
RATES = [0.5, 0.25, 0.75, 0.0625, 0.30078125, 0.05, 0.1, 0.3, 0.7, 0.9, 0.95]

DTYPES = [
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz",
]  # fmt: skip


def kept_probability(rate: Any) -> np.ndarray:
    """The probability that the bits realise, by which the library scales weights."""
    ones = np.ones(np.shape(rate), np.float32)
    return np.asarray(jdrop.scale_weights({"w": ones}, {"w": rate})["w"], np.float64)


def assert_same_bits(actual: Any, expected: Any) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes(), f"{actual} is not {expected}"


def wide(x: Any) -> np.ndarray:
    """The same values in float64 or complex128, in which tests take all NaN as equal."""
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def channel_rates(n: int) -> Array:
    return jnp.linspace(0.0, 1.0, n)


TAKES_A_RATE: dict[str, Callable[[Any], Any]] = {
    "dropout": lambda rate: jdrop.dropout(jax.random.key(0), jnp.ones((4, 3)), rate),
    "keep_mask": lambda rate: jdrop.keep_mask(jax.random.key(0), (4, 3), rate),
    "apply_mask": lambda rate: jdrop.apply_mask(jnp.ones((4, 3), bool), jnp.ones((4, 3)), rate),
    "unscaled": lambda rate: jdrop.apply_mask(
        jnp.ones((4, 3), bool), jnp.ones((4, 3)), rate, scale=False
    ),
    "scale_weights": lambda rate: jdrop.scale_weights({"w": jnp.ones((4, 3))}, {"w": rate}),
}


def signed_infinite_and_nan_values(dtype: Any) -> Array:
    values = np.array([0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan])
    if np.issubdtype(dtype, np.complexfloating):
        values = np.array([complex(a, b) for a, b in itertools.product(values, values)])
    return jnp.asarray(values.astype(dtype))


@dataclass(frozen=True)
class Case:
    """Arguments of dropout for an input of shape (8, 6)."""

    rate: float | tuple[float, ...]
    broadcast_dims: tuple[int, ...] = ()
    scale: bool = True

    def __call__(self, key: Array, x: Array) -> Array:
        rate = jnp.array(self.rate) if isinstance(self.rate, tuple) else self.rate
        options = {"broadcast_dims": self.broadcast_dims, "scale": self.scale}
        return jdrop.dropout(key, x, rate, **options)

    def multiplier(self, key: Array, dtype: Any = jnp.float32) -> Array:
        """Mask times scale: dropout with a fixed key multiplies its input by these factors."""
        return self(clone(key), jnp.ones((8, 6), dtype))
