"""Runs standard batteries of randomness tests on mask bits, drawn as the layers of a run draw them.

A run has a key, a step folds its number in, and the sites of a step split that. Of each site one
mask is drawn at a rate of 1/2, so that every element is a bit: with `--bits 1` the rate is a
number, which takes one random bit an element, with `--bits 16` a traced array, which takes
sixteen. The masks follow one another, packed eight elements to a byte.

The batteries are Rabbit and Alphabit of TestU01 (L'Ecuyer and Simard 2007), each on the same
`2**log2-bits` bits, and tests of dieharder (Brown 2004), each on bits of its own.
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
"""Of the sites of a step; together a whole number of bytes."""

DIEHARDER = {
    **dict.fromkeys([0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 15, 16, 17, 100, 101, 102], 0),
    **{200: 4, 201: 4, 202: 5, 203: 0, 204: 0, 205: 0, 206: 0, 207: 0, 208: 0, 209: 0},
}
"""Its tests by number, each with its option ntuple; all but the suspect ones: 5, 6, 7 and 14."""

WEAK, FAILED = 1e-3, 1e-6
"""A p-value nearer than this to 0 or to 1."""


class Result(NamedTuple):
    """What one statistic of a battery gave."""

    test: str
    p_value: float

    @property
    def extremity(self) -> float:
        """The distance of the p-value from the nearer end."""
        return min(self.p_value, 1 - self.p_value)

    @property
    def verdict(self) -> str:
        """`failed`, `weak` or `passed`."""
        if self.extremity < FAILED:
            return "failed"
        return "weak" if self.extremity < WEAK else "passed"


class NotInstalledError(Exception):
    """A battery is missing; the message says how to get it."""


def mask_bytes(seed: int, num_bits: int) -> Iterator[bytes]:
    """The masks of one step after another, without end."""

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
    """Bytes of the operating system, without end."""
    while True:
        yield os.urandom(2**17)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Nothing that C code prints is seen: TestU01 writes reports that cannot be turned off."""
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
            "TestU01 is not installed: `apt-get install libtestu01-0` has it, "
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
        # A test that was not made has the p-value -1.
        if p_value >= 0:
            yield Result(f"{battery} {(name or b'').decode()}", p_value)


def dieharder(stream: Iterator[bytes]) -> Iterator[Result]:
    """The tests of dieharder, one process each, which reads on in the stream until it is done."""
    program = shutil.which("dieharder")
    if program is None:
        raise NotInstalledError("dieharder is not installed: `apt-get install dieharder` has it.")
    fields = [part for name in ("test_name", "ntuple", "pvalues") for part in ("-D", name)]
    for number, ntuple in DIEHARDER.items():
        command = [program, "-d", str(number), "-n", str(ntuple), "-g", "200", "-c", ",", *fields]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            # It ends as soon as it has read enough, in the middle of a write.
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
@click.option("--bits", type=click.Choice(["1", "16"]), default="1", help="Random bits an element.")
@click.option("--log2-bits", default=30, show_default=True, help="How many bits TestU01 reads.")
@click.option("--seed", default=0, show_default=True, help="Of the key of the run.")
@click.option("--control", is_flag=True, help="Bytes of the operating system instead of masks.")
def main(batteries: tuple[str, ...], bits: str, log2_bits: int, seed: int, control: bool) -> None:
    """Runs the batteries named, or all; ends with an error if a test failed."""
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
