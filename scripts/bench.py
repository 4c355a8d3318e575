"""Times jdrop's dropout beside no dropout and beside other libraries, in one process.

Variants are timed in turn, round after round, so that what slows the machine slows them all, and
what is printed are ratios of medians with the middle half of the rounds in brackets. Each variant
is a function of its own: jax caches what it traced by the identity of the function.
"""

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import jdrop
import jdrop.linen
from jdrop.ensemble import init_ensemble
from jdrop.network import Network
from jdrop.study.evaluation import of_predictions
from jdrop.study.tables import Predictions
from jdrop.thinned import thin
from jdrop.train import TrainState, train_step

Dropout = Callable[[Array, Array], Array]
"""`dropout(key, x)`, the rate being fixed."""

ROUNDS = 15


def no_dropout(key: Array, x: Array) -> Array:
    """The floor of every benchmark but `op`."""
    return x


def of_jdrop(rate: float) -> Dropout:
    """What is measured."""
    return lambda key, x: jdrop.dropout(key, x, rate)


def of_flax(rate: float) -> Dropout:
    """Flax's layer, given its key."""
    layer = nn.Dropout(rate, deterministic=False)
    return lambda key, x: layer.apply({}, x, rng=key)


def of_haiku(rate: float) -> Dropout:
    """Haiku's function."""
    import haiku

    return lambda key, x: haiku.dropout(key, rate, x)


def of_equinox(rate: float) -> Dropout:
    """Equinox's layer."""
    import equinox

    layer = equinox.nn.Dropout(rate)
    return lambda key, x: layer(x, key=key)


LIBRARIES = {"jdrop": of_jdrop, "flax": of_flax, "haiku": of_haiku, "equinox": of_equinox}


def torch_if_installed() -> Any:
    """PyTorch, or None."""
    # Its idle threads would go on spinning, on the cores that the next variant needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
    except ImportError:
        return None
    return torch


def variants(rates: tuple[float, ...]) -> Iterator[tuple[str, Dropout]]:
    """Each installed library at each rate, under its name in the tables."""
    for rate in rates:
        for name, make in LIBRARIES.items():
            try:
                yield f"{name} {rate:g}", make(rate)
            except ImportError:
                continue


def time_in_turn(runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one round that compiles and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for counted in [False] + [True] * ROUNDS:
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def show(title: str, seconds: dict[str, list[float]], per: int = 1) -> dict[str, Any]:
    """Prints a table, the first variant being 1, and returns its numbers; `per` runs in one."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    floor = next(iter(medians.values()))
    click.echo(f"\n{title}")
    rows = {}
    for name, values in seconds.items():
        low, _, high = statistics.quantiles(values, n=4)
        milliseconds, ratio = 1e3 * medians[name] / per, medians[name] / floor
        spread = [low / floor, high / floor]
        rows[name] = {"ms": milliseconds, "ratio": ratio, "middle_half": spread}
        click.echo(
            f"  {name:14s} {milliseconds:10.3f} ms {ratio:8.2f} [{spread[0]:.2f}, {spread[1]:.2f}]"
        )
    return rows


def looped(op: Dropout, shape: tuple[int, ...], dtype: Any, repeats: int) -> Callable[[], Array]:
    """`repeats` applications in one compiled loop, so that buffers are used again."""

    @jax.jit
    def loop(key: Array, x: Array) -> Array:
        return lax.fori_loop(0, repeats, lambda i, x: op(jax.random.fold_in(key, i), x), x)

    return partial(loop, jax.random.key(0), jnp.ones(shape, dtype))


def looped_in_torch(
    torch: Any, rate: float, shape: tuple[int, ...], repeats: int
) -> Callable[[], None]:
    """PyTorch's dropout as often, one call after the other, each on what the last one gave."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = torch.ones(shape, device=device)

    def loop() -> None:
        x = start
        for _ in range(repeats):
            x = torch.nn.functional.dropout(x, rate)
        if device == "cuda":
            torch.cuda.synchronize()

    return loop


def bench_op() -> dict[str, Any]:
    """One dropout inside a loop; 1 is `x * c`, which reads and writes the array as a copy does.

    PyTorch is called once for each dropout, and so only where an array is large. On a GPU also
    arrays that no cache holds, in float32 and bfloat16: there 1 / ratio is the fraction of the
    bandwidth of a copy.
    """
    results = {}
    torch = torch_if_installed()
    cases = [
        ((4096, 4096), "float32", 4),
        ((128, 1024), "float32", 200),
        ((50, 256), "float32", 500),
    ]
    if jax.default_backend() == "gpu":
        cases += [((16384, 16384), "float32", 20), ((16384, 16384), "bfloat16", 20)]
    for shape, dtype, repeats in cases:
        runs = {"x * c": looped(lambda key, x: x * 0.999, shape, dtype, repeats)}
        for rate in (0.5, 0.25, 0.1):
            for name, dropout in variants((rate,)):
                runs[name] = looped(dropout, shape, dtype, repeats)
            if torch is not None and shape == (4096, 4096):
                runs[f"torch {rate:g}"] = looped_in_torch(torch, rate, shape, repeats)
        name = f"{dtype} {' x '.join(map(str, shape))}"
        rows = results[name] = show(f"op, {name}", time_in_turn(runs), repeats)
        if shape == (16384, 16384):
            for variant, row in rows.items():
                row["of_copy"] = 1 / row["ratio"]
                click.echo(f"  {variant:14s} {row['of_copy']:8.0%} of the bandwidth of a copy")
    return results


def bench_block() -> dict[str, Any]:
    """The gradient of a transformer block: batch 8, length 256, width 256, 8 heads, 4 dropouts."""
    batch, length, width, heads = 8, 256, 256, 8
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = {name: (width, width) for name in ("query", "key", "value", "out")}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    params = {
        name: 0.05 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    inputs = jax.random.normal(keys[6], (batch, length, width))

    def norm(x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)

    def gradient(dropout: Dropout) -> Callable[[], Any]:
        def loss(params: dict[str, Array], x: Array, key: Array) -> Array:
            embedded, attention, residual, feed_forward = jax.random.split(key, 4)
            x = dropout(embedded, x)
            query, keys, value = (
                (norm(x) @ params[name]).reshape(batch, length, heads, width // heads)
                for name in ("query", "key", "value")
            )
            scores = jnp.einsum("bthd,bshd->bhts", query, keys) / (width / heads) ** 0.5
            weights = dropout(attention, jax.nn.softmax(scores))
            mixed = jnp.einsum("bhts,bshd->bthd", weights, value).reshape(x.shape)
            x = x + dropout(residual, mixed @ params["out"])
            hidden = jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]
            return jnp.sum((x + dropout(feed_forward, hidden)) ** 2)

        return partial(jax.jit(jax.grad(loss)), params, inputs, jax.random.key(1))

    runs = {"no dropout": gradient(no_dropout)}
    runs |= {name: gradient(dropout) for name, dropout in variants((0.1, 0.3, 0.5))}
    return show("block, gradient", time_in_turn(runs))


MLP_SIZES = ((64, 256), (256, 256), (256, 10))


def mlp_loss(dropout: Dropout) -> Callable[[list[Array], Array], Array]:
    """The loss of a network 64-256-256-10 on a batch of 50; a new function at each call."""
    inputs, labels = jax.random.normal(jax.random.key(2), (50, 64)), jnp.arange(50) % 10

    def loss(params: list[Array], key: Array) -> Array:
        first, second = jax.random.split(key)
        x = dropout(first, jax.nn.relu(inputs @ params[0]))
        x = dropout(second, jax.nn.relu(x @ params[1]))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(x @ params[2], labels)
        return losses.mean()

    return loss


def bench_mlp() -> dict[str, Any]:
    """A training step of 20 vmapped networks 64-256-256-10, batch 50, Adam."""
    members, steps = 20, 40
    optimizer = optax.adam(1e-3)
    keys = jax.random.split(jax.random.key(0), members)
    params = [0.05 * jax.random.normal(jax.random.key(1), (members, *size)) for size in MLP_SIZES]
    opt_state = jax.vmap(optimizer.init)(params)

    def training(dropout: Dropout) -> Callable[[], Any]:
        loss = mlp_loss(dropout)

        def member(key: Array, params: list[Array], opt_state: Any) -> Any:
            def step(carry: tuple[Any, Any], i: Array) -> tuple[Any, None]:
                params, opt_state = carry
                grads = jax.grad(loss)(params, jax.random.fold_in(key, i))
                updates, opt_state = optimizer.update(grads, opt_state)
                return (optax.apply_updates(params, updates), opt_state), None

            return lax.scan(step, (params, opt_state), jnp.arange(steps))[0]

        return partial(jax.jit(jax.vmap(member)), keys, params, opt_state)

    runs = {"no dropout": training(no_dropout)}
    runs |= {name: training(dropout) for name, dropout in variants((0.1, 0.5))}
    return show(f"mlp, a step of {members} networks", time_in_turn(runs), steps)


def bench_memory() -> dict[str, Any]:
    """Temporary memory of the gradient of six dropout sites, as the compiler plans it."""
    weights, inputs = jnp.ones((6, 512, 512)), jnp.ones((512, 512))

    def temporary_mib(dropout: Dropout) -> float:
        def loss(x: Array, weights: Array, key: Array) -> Array:
            for site_key, matrix in zip(jax.random.split(key, 6), weights, strict=True):
                x = jnp.sin(dropout(site_key, x @ matrix))
            return x.sum()

        lowered = jax.jit(jax.grad(loss)).lower(inputs, weights, jax.random.key(0))
        return lowered.compile().memory_analysis().temp_size_in_bytes / 2**20

    floor = temporary_mib(no_dropout)
    rows = {"no dropout": {"MiB": floor, "ratio": 1.0}}
    for name, dropout in variants((0.5, 0.1)):
        mib = temporary_mib(dropout)
        rows[name] = {"MiB": mib, "ratio": mib / floor}
    click.echo("\nmemory, gradient of six sites of 512 x 512 float32")
    for name, row in rows.items():
        click.echo(f"  {name:14s} {row['MiB']:10.2f} MiB {row['ratio']:8.2f}")
    return rows


def flax_first(make: Callable[[Dropout], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """What `make` makes of each library at two rates, Flax's before the others."""
    runs = {name: make(dropout) for name, dropout in variants((0.1, 0.5))}
    return {name: runs.pop(name) for name in ("flax 0.1", "flax 0.5")} | runs


def compiling_a_step(dropout: Dropout) -> Callable[[], Any]:
    """Compiles a training step of one network 64-256-256-10, Adam."""
    optimizer = optax.adam(1e-3)
    params = [jnp.ones(size) for size in MLP_SIZES]
    opt_state = optimizer.init(params)

    def compile_once() -> Any:
        loss = mlp_loss(dropout)

        def step(params: list[Array], opt_state: Any, key: Array) -> Any:
            updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
            return optax.apply_updates(params, updates), opt_state

        jax.jit(step).lower(params, opt_state, jax.random.key(0)).compile()

    return compile_once


def bench_compile() -> dict[str, Any]:
    """Time to trace and compile: a step, six dropout sites alone, and attention; 1 is Flax."""
    step = show("compile, a training step", time_in_turn(flax_first(compiling_a_step)))

    weights, inputs = jnp.ones((6, 64, 64)), jnp.ones((64, 64))

    def compiling(dropout: Dropout) -> Callable[[], Any]:
        def compile_once() -> Any:
            # A new function each time, or the trace would be found in a cache.
            def loss(x: Array, weights: Array, key: Array) -> Array:
                for site_key, matrix in zip(jax.random.split(key, 6), weights, strict=True):
                    x = jnp.sin(dropout(site_key, x @ matrix))
                return x.sum()

            jax.jit(jax.grad(loss)).lower(inputs, weights, jax.random.key(0)).compile()

        return compile_once

    sites = show("compile, gradient of six sites", time_in_turn(flax_first(compiling)))

    key, q = jax.random.key(0), jnp.ones((1, 512, 2, 64))

    def compiling_attention(attention: Callable[..., Array]) -> Callable[[], Any]:
        def compile_once() -> Any:
            def loss(q: Array) -> Array:
                return attention(q, q, q, dropout_rate=0.1).sum()

            jax.jit(jax.grad(loss)).lower(q).compile()

        return compile_once

    flax_attention = partial(nn.dot_product_attention, dropout_rng=key, broadcast_dropout=False)
    attentions = {
        "flax 0.1": compiling_attention(flax_attention),
        "jdrop 0.1": compiling_attention(partial(jdrop.dot_product_attention, key)),
    }
    attention = show("compile, gradient of attention", time_in_turn(attentions))
    return {"step": step, "six sites": sites, "attention": attention}


def bench_attention() -> dict[str, Any]:
    """Gradient of attention of 4096 queries to 4096 keys, 2 heads of 64; 1 is without dropout."""
    key = jax.random.key(1)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4096, 2, 64))
    jdrop_attention = partial(jdrop.dot_product_attention, key)

    def flax_attention(q: Array, k: Array, v: Array, rate: float) -> Array:
        return nn.dot_product_attention(
            q, k, v, dropout_rng=key, dropout_rate=rate, broadcast_dropout=False
        )

    functions: dict[str, Callable[..., Array]] = {
        "no dropout": partial(jdrop_attention, dropout_rate=0.0),
        "jdrop 0.1": partial(jdrop_attention, dropout_rate=0.1),
        "jdrop 0.5": partial(jdrop_attention, dropout_rate=0.5),
        "jax.nn, none": jax.nn.dot_product_attention,
        "flax 0.1": partial(flax_attention, rate=0.1),
        "flax 0.5": partial(flax_attention, rate=0.5),
    }
    runs: dict[str, Callable[[], Any]] = {}
    mib = {}
    for name, function in functions.items():

        def loss(q: Array, k: Array, v: Array, function: Any = function) -> Array:
            return (function(q, k, v) ** 2).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
        mib[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        runs[name] = partial(compiled, q, k, v)
    torch = torch_if_installed()
    if torch is not None:
        for rate in (0.0, 0.1):
            runs[f"torch {rate:g}"] = torch_attention(torch, (q, k, v), rate)
    rows = show("attention, gradient", time_in_turn(runs))
    for name, memory in mib.items():
        rows[name]["MiB"] = memory
        click.echo(f"  {name:14s} {memory:10.2f} MiB of temporary memory")
    return rows


def torch_attention(torch: Any, inputs: tuple[Array, ...], rate: float) -> Callable[[], None]:
    """The same gradient by PyTorch, which has dropout inside its attention."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [
        torch.tensor(jax.device_get(x.swapaxes(1, 2)), device=device, requires_grad=True)
        for x in inputs
    ]

    def run() -> None:
        y = torch.nn.functional.scaled_dot_product_attention(*tensors, dropout_p=rate)
        torch.autograd.grad((y**2).sum(), tensors)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def bench_statistics() -> dict[str, Any]:
    """Seconds of all statistics of a report: 20 networks, 10,000 examples, 10 classes, 1,000 draws.

    Of four replicates of five plain networks, beside four others; first with compilation.
    """
    num_examples, num_classes = 10_000, 10
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, num_examples).astype(np.int32)
    signal = 3 * np.eye(num_classes)[labels] + rng.normal(size=(num_examples, num_classes))

    def members(count: int) -> np.ndarray:
        logits = signal + 2 * rng.normal(size=(count, num_examples, num_classes))
        return np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))

    predictions = Predictions({"plain": members(20), "dropout": members(4)}, labels)
    seconds = {}
    for turn in ("with compilation", "again"):
        start = time.perf_counter()
        of_predictions(predictions, "noise", replicates=4)
        seconds[turn] = time.perf_counter() - start
        click.echo(f"statistics, {turn}: {seconds[turn]:.1f} s")
    return seconds


def multiplications(sizes: tuple[int, ...], share: float) -> float:
    """Those of a step whose hidden layers keep a share of their units, to those of a full step."""

    def count(sizes: list[float]) -> float:
        pairs = list(itertools.pairwise(sizes))
        # Forward and for the weights; for what comes in everywhere but at the first layer.
        return sum((3 - (number == 0)) * a * b for number, (a, b) in enumerate(pairs))

    thin = [size * share for size in sizes[1:-1]]
    return count([sizes[0], *thin, sizes[-1]]) / count(list(map(float, sizes)))


class DenseNet(nn.Module):
    """Hidden layers with rectifiers and a library's dropout."""

    hidden: tuple[int, ...]
    rate: float
    dropout: Any = jdrop.linen.Dropout

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Ten logits."""
        for units in self.hidden:
            x = nn.relu(nn.Dense(units)(x))
            x = self.dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(10)(x)


def stepping(
    network: Network, optimizer: optax.GradientTransformation, batch: Any, steps: int, members: int
) -> Callable[[], Any]:
    """So many training steps of each member in one compiled scan, each call after the last."""

    def many(state: TrainState, key: Array) -> TrainState:
        def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
            return train_step(key, state, batch)[0], None

        return lax.scan(step, state, jax.random.split(key, steps))[0]

    init = partial(init_ensemble, ensemble_size=members)
    state = init(jax.random.key(0), network, optimizer, batch[0])
    keys = jax.random.split(jax.random.key(1), members)
    run = jax.vmap(many)
    if members == 1:
        state, keys, run = jax.tree.map(lambda leaf: leaf[0], state), keys[0], many
    compiled = jax.jit(run, donate_argnums=0)

    def call() -> Any:
        nonlocal state
        state = compiled(state, keys)
        return state.step, state.variables

    return call


def bench_thinned() -> dict[str, Any]:
    """A training step without dropout (1), with masks, and of thinned networks, at rate 1/2."""
    adam, sgd = optax.adam(1e-3), optax.sgd(1e-2)
    cases = [
        ((784, 1024, 1024, 10), 128, "Adam", adam, 20, 1),
        ((784, 2048, 2048, 10), 512, "Adam", adam, 5, 1),
        ((784, 2048, 2048, 10), 1024, "SGD", sgd, 3, 1),
        ((784, 4096, 4096, 4096, 10), 1024, "SGD", sgd, 1, 1),
        ((784, 1024, 1024, 10), 128, "Adam", adam, 5, 5),
    ]
    results = {}
    for sizes, batch_size, optimizer_name, optimizer, steps, members in cases:
        inputs = jax.random.normal(jax.random.key(0), (batch_size, sizes[0]))
        labels = jax.random.randint(jax.random.key(1), (batch_size,), 0, 10)
        masked = jdrop.linen.as_network(DenseNet(sizes[1:-1], 0.5))
        networks = {
            "no dropout": jdrop.linen.as_network(DenseNet(sizes[1:-1], 0.0)),
            "flax": jdrop.linen.as_network(DenseNet(sizes[1:-1], 0.5, nn.Dropout)),
            "jdrop": masked,
            "any units": thin(masked, inputs, block_size=1),
        }
        for block_size in (16, 64, 128, 256):
            networks[f"blocks of {block_size}"] = thin(masked, inputs, block_size=block_size)
        runs = {
            name: stepping(network, optimizer, (inputs, labels), steps, members)
            for name, network in networks.items()
        }
        name = f"{'-'.join(map(str, sizes))}, batch {batch_size}, {optimizer_name}"
        name = f"{members} vmapped, {name}" if members > 1 else name
        rows = results[name] = show(f"thinned, {name}", time_in_turn(runs), steps)
        rows["multiplications"] = {"ratio": multiplications(sizes, 0.5)}
        click.echo(f"  {'multiplications':14s} {rows['multiplications']['ratio']:21.2f}")
    return results


BENCHMARKS = {
    "op": bench_op,
    "block": bench_block,
    "mlp": bench_mlp,
    "attention": bench_attention,
    "memory": bench_memory,
    "compile": bench_compile,
    "thinned": bench_thinned,
    "statistics": bench_statistics,
}


def versions() -> dict[str, str]:
    """Of what is compared, and the device."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for package in ("jdrop", "jax", "flax", "dm-haiku", "equinox", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@click.command(help=__doc__)
@click.argument("benchmarks", nargs=-1, type=click.Choice([*BENCHMARKS]))
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where to write the numbers.")
def main(benchmarks: tuple[str, ...], path: Path | None) -> None:
    """Runs the benchmarks named, or all."""
    results: dict[str, Any] = {"versions": versions()}
    click.echo(", ".join(f"{name} {value}" for name, value in results["versions"].items()))
    for name in benchmarks or BENCHMARKS:
        results[name] = BENCHMARKS[name]()
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
