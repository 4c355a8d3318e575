"""Measures the memory of many members: what the compiler plans, and what a run takes at most.

The compiler plans for 16 members 1024-256-10. The run is one command, which trains and compares
1,000 plain networks 64-64-10 on digits; beside it runs the same command with 4.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import optax

from jdrop.ensemble import fit_ensemble, init_ensemble, predict
from jdrop.memory import machine_memory
from jdrop.study.models import MLP, Model

MEMBERS, EXAMPLES, FEATURES, BATCH_SIZE = 16, 5120, 1024, 50

RESULTS = Path(__file__).parent / "results" / "memory.md"

COMMAND = ("--hidden", "64", "--replicates", "2", "--budget", "2", "--num-samples", "20")
COMMAND += ("--epochs", "20", "--no-tune", "--no-theory", "--no-controls")
"""Of the run, besides `--ensemble-size`."""

PEAK = (
    "import resource, subprocess, sys; "
    "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)
"""Runs a command as its only child, and prints the most memory that it took, in KiB."""


def planned_mib() -> dict[str, float]:
    """What programs take beside data, state and results, as the compiler plans it."""
    network = Model(lambda: MLP((256,), 10)).dropout
    key = jax.random.key(0)
    inputs = jax.ShapeDtypeStruct((EXAMPLES, FEATURES), jnp.float32)
    labels = jax.ShapeDtypeStruct((EXAMPLES,), jnp.int32)
    example = jnp.zeros((1, FEATURES))
    optimizer = optax.adam(1e-3)
    init = partial(init_ensemble, network=network, optimizer=optimizer, ensemble_size=MEMBERS)
    state = jax.eval_shape(lambda: init(key, inputs=example))

    def fit(key: Any, state: Any, inputs: Any, labels: Any, **options: Any) -> Any:
        sizes = {"num_epochs": 1, "batch_size": BATCH_SIZE}
        return fit_ensemble(key, state, inputs, labels, **sizes, **options)

    def read(variables: Any, inputs: Any, count: int) -> Any:
        return predict(None, network, variables, inputs, members_at_once=count)

    fits = {
        "a fit, all 16 at once": {"members_at_once": MEMBERS},
        "a fit, 2 at once": {"members_at_once": 2},
        'a fit, `batching="scan"`': {"batching": "scan"},
    }
    reads = {
        "predictions for all examples, one after another": 1,
        "predictions, 4 at once": 4,
        "predictions, all 16 at once": MEMBERS,
    }
    arguments = key, state, inputs, labels
    lowered = {
        name: jax.jit(partial(fit, **options)).lower(*arguments) for name, options in fits.items()
    }
    for name, count in reads.items():
        lowered[name] = jax.jit(partial(read, count=count)).lower(state.variables, inputs)
    return {
        name: program.compile().memory_analysis().temp_size_in_bytes / 2**20
        for name, program in lowered.items()
    }


def peak_mib(ensemble_size: int, folder: Path) -> float:
    """The most resident memory of the run with so many networks in each of two replicates."""
    code = "import sys; from jdrop.study import main; sys.exit(main())"
    out = ("--out", str(folder / str(ensemble_size)))
    size = ("--ensemble-size", str(ensemble_size))
    command = (sys.executable, "-c", code, *COMMAND, *size, *out)
    measured = subprocess.run(
        (sys.executable, "-c", PEAK, *command),
        capture_output=True,
        text=True,
        check=False,
        # The compiler takes memory too, so each run compiles.
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    if measured.returncode:
        raise click.ClickException(f"the run has failed: {measured.stderr.strip()}")
    return int(measured.stdout) / 2**10


def page(planned: dict[str, float], peaks: dict[int, float]) -> str:
    """The numbers in Markdown."""
    lines = [
        "# Memory of many members",
        "",
        f"`python scripts/memory.py`, with jax {jax.__version__} on a CPU of "
        f"{machine_memory() / 2**30:.0f} GiB.",
        "",
        "## What the compiler plans",
        "",
        f"{MEMBERS} members {FEATURES}-256-10 with dropout and Adam (48 MiB), on {EXAMPLES:,} "
        f"examples (20 MiB) in batches of {BATCH_SIZE}. The memory is that beside data, state and "
        "results.",
        "",
        "| program | MiB |",
        "|---|---|",
        *(f"| {name} | {mib:.1f} |" for name, mib in planned.items()),
        "",
        "## What a run takes at most",
        "",
        f"`jdrop {shlex.join(COMMAND)} --ensemble-size N`",
        "on digits, where the networks are 64-64-10. It trains 2 N plain ones in one program. The "
        "memory is the largest resident set of the process, with Python, JAX and its compiler.",
        "",
        "| plain networks | MiB |",
        "|---|---|",
        *(f"| {2 * size:,} | {mib:,.0f} |" for size, mib in peaks.items()),
    ]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option(
    "--members",
    type=click.IntRange(min=6),
    default=1000,
    show_default=True,
    help="Plain networks of the larger run; an even number.",
)
@click.option(
    "--page",
    "path",
    type=click.Path(path_type=Path),
    default=RESULTS,
    help="File to write the page to.",
)
def main(members: int, path: Path) -> None:
    """Measures, prints the page and writes it."""
    with tempfile.TemporaryDirectory() as folder:
        peaks = {size: peak_mib(size, Path(folder)) for size in (2, members // 2)}
    text = page(planned_mib(), peaks)
    path.write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
