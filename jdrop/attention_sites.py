"""The dropout of attention layers as dropout sites, whose keys a function chooses."""

import functools
from collections.abc import Callable
from typing import Any

from jax import Array

NO_KEY: Any = object()
"""Given to an attention layer in place of a key, so that it makes none."""


def with_site(
    attention_fn: Callable[..., Array],
    choose_key: Callable[..., Array | None],
    make_key: Callable[[], Array] | None = None,
) -> Callable[..., Array]:
    """Returns an `attention_fn` that drops with a chosen key, or not at all.

    Args:
        attention_fn: of a layer of linen or nnx, with its arguments.
        choose_key: called with the properties of a `DropoutSite` as far as the call tells them,
            unless the rate is 0. Returns the key, or None to drop nothing.
        make_key: returns the key of a layer that was called with `NO_KEY`.
    """

    # Flax gives an `attention_fn` those arguments that its signature has.
    @functools.wraps(attention_fn)
    def attend(q: Array, k: Array, *args: Any, **options: Any) -> Array:
        given, rate = options.get("dropout_rng"), options.get("dropout_rate", 0.0)
        key = None
        if rate:
            *batch, length, heads, _ = q.shape
            shape = (*batch, heads, length, k.shape[-3])
            shares = options.get("broadcast_dropout", False)
            key = choose_key(
                shape=shape,
                rate=rate,
                broadcast_dims=tuple(range(len(shape) - 2)) if shares else (),
                deterministic=options.get("deterministic", False),
                make_key=make_key if given is NO_KEY and make_key is not None else lambda: given,
            )
        chosen = {"dropout_rng": key, "deterministic": key is None}
        return attention_fn(
            q, k, *args, **{name: chosen.get(name, value) for name, value in options.items()}
        )

    return attend
