"""Runs standard batteries of randomness tests on mask bits, which are drawn as in training.

The key of a run is folded with the step's index and then split into the keys of dropout layers.
Each layer draws a mask at a rate of 1/2, so that every element is a bit. With `--bits 1` the rate
is a Python float, and an element takes 1 random bit. With `--bits 16` the rate is traced, and an
element takes 16. The masks follow each other, packed with eight elements to a byte.

The batteries Rabbit and Alphabit of TestU01 (L'Ecuyer and Simard 2007) both read the same
`2**log2-bits` bits. The tests of dieharder (Brown 2004) each read bits of their own.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jdrop

SHAPES = [(128, 1024), (50, 256), (8, 197, 768)]
"""The shapes of the masks of a step. Their elements fill whole bytes."""

DIEHARDER = {
    **dict.fromkeys([0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 15, 16, 17, 100, 101, 102], 0),
    **{200: 4, 201: 4, 202: 5, 203: 0, 204: 0, 205: 0, 206: 0, 207: 0, 208: 0, 209: 0},
}
"""Indices of dieharder's tests, with their ntuples, without the suspect tests 5, 6, 7 and 14."""

WEAK, FAILED = 1e-3, 1e-6
"""A p-value is weak, or failed, if it is closer to 0 or 1 than this."""


class Result(NamedTuple):
    """The p-value of a statistic."""

    test: str
    p_value: float

    @property
    def extremity(self) -> float:
        """The distance of the p-value from 0 or 1, whichever is closer."""
        return min(self.p_value, 1 - self.p_value)

    @property
    def verdict(self) -> str:
        """`failed`, `weak` or `passed`."""
        if self.extremity < FAILED:
            return "failed"
        return "weak" if self.extremity < WEAK else "passed"


class NotInstalledError(Exception):
    """A battery is not installed; the message says how to install it."""


def mask_bytes(seed: int, num_bits: int) -> Iterator[bytes]:
    """An endless stream of the masks of step after step."""

    @partial(jax.jit, static_argnames="static_rate")
    def masks(key: Array, traced_rate: Array, static_rate: float | None) -> list[Array]:
        rate = traced_rate if static_rate is None else static_rate
        keys = jax.random.split(key, len(SHAPES))
        return [jdrop.keep_mask(key, shape, rate) for key, shape in zip(keys, SHAPES, strict=True)]

    run_key = jax.random.key(seed)
    step = 0
    while True:
        step_key = jax.random.fold_in(run_key, step)
        drawn = masks(step_key, jnp.float32(0.5), 0.5 if num_bits == 1 else None)
        yield np.packbits(np.concatenate([np.ravel(mask) for mask in drawn])).tobytes()
        step += 1


def control_bytes() -> Iterator[bytes]:
    """An endless stream of random bytes of the operating system."""
    while True:
        yield os.urandom(2**17)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Hides what C code prints, since the reports of TestU01 cannot be turned off."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    stdout = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def testu01(stream: Iterator[bytes], num_bits: int, battery: str) -> Iterator[Result]:
    """A battery of TestU01 on the first `num_bits` bits of the stream, read from a file."""
    try:
        library = ctypes.CDLL("libtestu01.so.0")
    except OSError:
        raise NotInstalledError(
            "TestU01 is not installed; install it with `apt-get install libtestu01-0`, "
            "from the section non-free of Debian."
        ) from None
    run_battery = getattr(library, f"bbattery_{battery}File")
    run_battery.argtypes = [ctypes.c_char_p, ctypes.c_double]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        missing = num_bits // 8
        while missing:
            missing -= file.write(next(stream)[:missing])
        file.flush()
        with silenced():
            run_battery(file.name.encode(), num_bits)
    count = ctypes.c_int.in_dll(library, "bbattery_NTests").value
    p_values = (ctypes.c_double * count).in_dll(library, "bbattery_pVal")
    names = (ctypes.c_char_p * count).in_dll(library, "bbattery_TestNames")
    for name, p_value in zip(names, p_values, strict=True):
        # A test that did not run has the p-value -1.
        if p_value >= 0:
            yield Result(f"{battery} {(name or b'').decode()}", p_value)


def dieharder(stream: Iterator[bytes]) -> Iterator[Result]:
    """The tests of dieharder. Each runs in its own process and continues to read the stream."""
    program = shutil.which("dieharder")
    if program is None:
        raise NotInstalledError(
            "dieharder is not installed; install it with `apt-get install dieharder`."
        )
    columns = ["-D", "test_name", "-D", "ntuple", "-D", "pvalues"]
    for test_index, ntuple in DIEHARDER.items():
        command = [
            program,
            "-d",
            str(test_index),
            "-n",
            str(ntuple),
            "-g",
            "200",
            "-c",
            ",",
            *columns,
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            # The process ends as soon as it has read enough, in the middle of a write.
            with contextlib.suppress(BrokenPipeError):
                while process.poll() is None:
                    process.stdin.write(next(stream))
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            lines = process.stdout.read().decode().splitlines()
        for line in lines:
            name, size, p_value = line.split(",")
            yield Result(f"dieharder {name.strip()} {int(size)}", float(p_value))


BATTERIES = ("Rabbit", "Alphabit", "dieharder")


@click.command(help=__doc__)
@click.argument("batteries", nargs=-1, type=click.Choice(BATTERIES))
@click.option(
    "--bits", type=click.Choice(["1", "16"]), default="1", help="Random bits per element."
)
@click.option(
    "--log2-bits", default=30, show_default=True, help="Logarithm of the bits that TestU01 reads."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the run.")
@click.option("--control", is_flag=True, help="Test bytes of the operating system instead.")
def main(batteries: tuple[str, ...], bits: str, log2_bits: int, seed: int, control: bool) -> None:
    """Runs the named batteries, or all. The exit status is 1 if a test failed, 2 if none ran."""
    results: list[Result] = []
    for battery in batteries or BATTERIES:
        stream = control_bytes() if control else mask_bytes(seed, int(bits))
        run: Callable[[], Iterator[Result]] = partial(dieharder, stream)
        if battery != "dieharder":
            run = partial(testu01, stream, 2**log2_bits, battery)
        try:
            for result in run():
                results.append(result)
                click.echo(f"{result.test:44s} {result.p_value:12.8f}  {result.verdict}")
        except NotInstalledError as error:
            click.echo(error, err=True)
    if not results:
        sys.exit(2)
    verdicts = [result.verdict for result in results]
    weak, failed = verdicts.count("weak"), verdicts.count("failed")
    click.echo(f"{len(results)} tests, {weak} weak, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
