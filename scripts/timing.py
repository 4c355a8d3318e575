"""Times functions in turn, and makes the same dropout from each installed library.

Functions are timed round after round, so that whatever slows the machine slows them all. Tables
show ratios of medians, with the middle half of the rounds in brackets.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import flax.linen as nn
import jax
from jax import Array

import jdrop

Dropout = Callable[[Array, Array], Array]
"""`dropout(key, x)`, at a fixed rate."""

ROUNDS = 15


def jdrop_dropout(rate: float) -> Dropout:
    """The function of jdrop."""
    return lambda key, x: jdrop.dropout(key, x, rate)


def flax_dropout(rate: float) -> Dropout:
    """The layer of Flax, with an explicit key."""
    layer = nn.Dropout(rate, deterministic=False)
    return lambda key, x: layer.apply({}, x, rng=key)


def haiku_dropout(rate: float) -> Dropout:
    """The function of Haiku."""
    import haiku

    return lambda key, x: haiku.dropout(key, rate, x)


def equinox_dropout(rate: float) -> Dropout:
    """The layer of Equinox."""
    import equinox

    layer = equinox.nn.Dropout(rate)
    return lambda key, x: layer(x, key=key)


LIBRARIES = {
    "jdrop": jdrop_dropout,
    "flax": flax_dropout,
    "haiku": haiku_dropout,
    "equinox": equinox_dropout,
}


def dropouts(rates: tuple[float, ...]) -> Iterator[tuple[str, Dropout]]:
    """The dropout of each installed library at each rate, by its name in the tables.

    Each is a function of its own, since JAX caches traces by the identity of the function.
    """
    for rate in rates:
        for library, make in LIBRARIES.items():
            try:
                yield f"{library} {rate:g}", make(rate)
            except ImportError:
                continue


def torch_if_installed() -> Any:
    """PyTorch, or None."""
    # Otherwise the idle threads of PyTorch spin on the cores that the next function needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
    except ImportError:
        return None
    return torch


def time_in_turn(
    functions: dict[str, Callable[[], Any]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """The seconds of each function in each round. A first round compiles and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for counted in [False] + [True] * rounds:
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def print_times(title: str, seconds: dict[str, list[float]], repeats: int = 1) -> dict[str, Any]:
    """Prints a table whose ratios are to the first function, and returns its numbers.

    Args:
        title: of the table.
        seconds: the result of `time_in_turn`.
        repeats: how often a function repeats what is measured; the milliseconds are of one repeat.
    """
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first_median = next(iter(medians.values()))
    click.echo(f"\n{title}")
    rows = {}
    for name, values in seconds.items():
        low, _, high = statistics.quantiles(values, n=4)
        milliseconds, ratio = 1e3 * medians[name] / repeats, medians[name] / first_median
        middle_half = [low / first_median, high / first_median]
        rows[name] = {"ms": milliseconds, "ratio": ratio, "middle_half": middle_half}
        click.echo(
            f"  {name:14s} {milliseconds:10.3f} ms {ratio:8.2f} "
            f"[{middle_half[0]:.2f}, {middle_half[1]:.2f}]"
        )
    return rows
