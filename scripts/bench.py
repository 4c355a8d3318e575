"""Times jdrop's dropout beside no dropout and beside other libraries, in a single process."""

import itertools
import json
import platform
import time
from collections.abc import Callable
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
from bench_ensembles import bench_checkpoints, bench_ensemble, bench_orders
from jax import Array, lax
from timing import Dropout, dropouts, print_times, time_in_turn, torch_if_installed

import jdrop
import jdrop.linen
from jdrop.ensemble import init_ensemble
from jdrop.network import Network
from jdrop.study.data import Predictions
from jdrop.study.evaluation import of_predictions
from jdrop.thinned import thin
from jdrop.train import TrainState, train_step


def no_dropout(key: Array, x: Array) -> Array:
    """Returns its input, for the first row of most benchmarks."""
    return x


def in_a_loop(op: Dropout, shape: tuple[int, ...], dtype: Any, repeats: int) -> Callable[[], Array]:
    """Applies `op` repeatedly in a compiled loop, which reuses buffers."""

    @jax.jit
    def loop(key: Array, x: Array) -> Array:
        return lax.fori_loop(0, repeats, lambda i, x: op(jax.random.fold_in(key, i), x), x)

    return partial(loop, jax.random.key(0), jnp.ones(shape, dtype))


def in_a_torch_loop(
    torch: Any, rate: float, shape: tuple[int, ...], repeats: int
) -> Callable[[], None]:
    """Applies PyTorch's dropout repeatedly, each call to the output of the last."""
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
    """A dropout inside a loop, beside `x * c`, which reads and writes the array as a copy does.

    PyTorch calls each dropout separately, so it is timed only on the large array. A GPU also gets
    arrays too large for its cache, in float32 and bfloat16. For these, 1 / ratio is the share of
    the bandwidth of a copy.
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
        runs = {"x * c": in_a_loop(lambda key, x: x * 0.999, shape, dtype, repeats)}
        for rate in (0.5, 0.25, 0.1):
            for library_and_rate, dropout in dropouts((rate,)):
                runs[library_and_rate] = in_a_loop(dropout, shape, dtype, repeats)
            if torch is not None and shape == (4096, 4096):
                runs[f"torch {rate:g}"] = in_a_torch_loop(torch, rate, shape, repeats)
        name = f"{dtype} {' x '.join(map(str, shape))}"
        rows = results[name] = print_times(f"op, {name}", time_in_turn(runs), repeats)
        if shape == (16384, 16384):
            for library_and_rate, row in rows.items():
                share = row["of_copy"] = 1 / row["ratio"]
                click.echo(f"  {library_and_rate:14s} {share:8.0%} of the bandwidth of a copy")
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
    runs |= {name: gradient(dropout) for name, dropout in dropouts((0.1, 0.3, 0.5))}
    return print_times("block, gradient", time_in_turn(runs))


MLP_SIZES = ((64, 256), (256, 256), (256, 10))


def mlp_loss(dropout: Dropout) -> Callable[[list[Array], Array], Array]:
    """Returns the loss of a network 64-256-256-10 on a batch of 50, each time a new function."""
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
    runs |= {name: training(dropout) for name, dropout in dropouts((0.1, 0.5))}
    return print_times(f"mlp, a step of {members} networks", time_in_turn(runs), steps)


def bench_memory() -> dict[str, Any]:
    """The temporary memory of the gradient of six dropouts, as the compiler plans it."""
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
    for name, dropout in dropouts((0.5, 0.1)):
        mib = temporary_mib(dropout)
        rows[name] = {"MiB": mib, "ratio": mib / floor}
    click.echo("\nmemory, gradient of six sites of 512 x 512 float32")
    for name, row in rows.items():
        click.echo(f"  {name:14s} {row['MiB']:10.2f} MiB {row['ratio']:8.2f}")
    return rows


def flax_first(make: Callable[[Dropout], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Calls `make` with each library's dropout at two rates, and puts Flax first."""
    runs = {name: make(dropout) for name, dropout in dropouts((0.1, 0.5))}
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
    """The time to trace and compile a training step, six dropouts alone, and attention."""
    step = print_times("compile, a training step", time_in_turn(flax_first(compiling_a_step)))

    weights, inputs = jnp.ones((6, 64, 64)), jnp.ones((64, 64))

    def compiling(dropout: Dropout) -> Callable[[], Any]:
        def compile_once() -> Any:
            # A new function each time, since JAX would find the trace of an old one in its cache.
            def loss(x: Array, weights: Array, key: Array) -> Array:
                for site_key, matrix in zip(jax.random.split(key, 6), weights, strict=True):
                    x = jnp.sin(dropout(site_key, x @ matrix))
                return x.sum()

            jax.jit(jax.grad(loss)).lower(inputs, weights, jax.random.key(0)).compile()

        return compile_once

    sites = print_times("compile, gradient of six sites", time_in_turn(flax_first(compiling)))

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
    attention = print_times("compile, gradient of attention", time_in_turn(attentions))
    return {"step": step, "six sites": sites, "attention": attention}


def bench_attention() -> dict[str, Any]:
    """The gradient of attention from 4096 queries to 4096 keys, with 2 heads of width 64."""
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
    rows = print_times("attention, gradient", time_in_turn(runs))
    for name, memory in mib.items():
        rows[name]["MiB"] = memory
        click.echo(f"  {name:14s} {memory:10.2f} MiB of temporary memory")
    return rows


def torch_attention(torch: Any, inputs: tuple[Array, ...], rate: float) -> Callable[[], None]:
    """The same gradient in PyTorch, whose attention has dropout too."""
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
    """The seconds of all statistics of a report, first with compilation, then without.

    Four replicates of five plain networks are compared with four networks with dropout, on 10,000
    examples of 10 classes, with 1,000 bootstrap draws.
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
    """The multiplications of a step with a share of the hidden units, relative to a full step."""

    def count(sizes: list[float]) -> float:
        # Each layer has three products: its outputs, the gradient of its weights, and the gradient
        # of its inputs. The first layer needs no gradient of its inputs.
        layers = enumerate(itertools.pairwise(sizes))
        return sum((2 if layer == 0 else 3) * n_in * n_out for layer, (n_in, n_out) in layers)

    kept = [size * share for size in sizes[1:-1]]
    return count([sizes[0], *kept, sizes[-1]]) / count(list(map(float, sizes)))


class DenseNet(nn.Module):
    """Dense hidden layers with ReLU and a dropout layer of jdrop or Flax."""

    hidden: tuple[int, ...]
    rate: float
    dropout: Any = jdrop.linen.Dropout

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns ten logits."""
        for units in self.hidden:
            x = nn.relu(nn.Dense(units)(x))
            x = self.dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(10)(x)


def train_steps(
    network: Network, optimizer: optax.GradientTransformation, batch: Any, steps: int, members: int
) -> Callable[[], Any]:
    """Compiles a scan of training steps of each member; each call continues from the last."""

    def scan_steps(state: TrainState, key: Array) -> TrainState:
        def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
            return train_step(key, state, batch)[0], None

        return lax.scan(step, state, jax.random.split(key, steps))[0]

    init = partial(init_ensemble, ensemble_size=members)
    state = init(jax.random.key(0), network, optimizer, batch[0])
    keys = jax.random.split(jax.random.key(1), members)
    run = jax.vmap(scan_steps)
    if members == 1:
        state, keys, run = jax.tree.map(lambda leaf: leaf[0], state), keys[0], scan_steps
    compiled = jax.jit(run, donate_argnums=0)

    def call() -> Any:
        nonlocal state
        state = compiled(state, keys)
        return state.step, state.variables

    return call


def bench_thinned() -> dict[str, Any]:
    """A training step without dropout, with masks, and of thinned networks, at rate 1/2."""
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
            name: train_steps(network, optimizer, (inputs, labels), steps, members)
            for name, network in networks.items()
        }
        name = f"{'-'.join(map(str, sizes))}, batch {batch_size}, {optimizer_name}"
        name = f"{members} vmapped, {name}" if members > 1 else name
        rows = results[name] = print_times(f"thinned, {name}", time_in_turn(runs), steps)
        rows["multiplications"] = {"ratio": multiplications(sizes, 0.5)}
        click.echo(f"  {'multiplications':14s} {rows['multiplications']['ratio']:21.2f}")
    return results


BENCHMARKS = {
    "op": bench_op,
    "block": bench_block,
    "mlp": bench_mlp,
    "ensemble": bench_ensemble,
    "orders": bench_orders,
    "checkpoints": bench_checkpoints,
    "attention": bench_attention,
    "memory": bench_memory,
    "compile": bench_compile,
    "thinned": bench_thinned,
    "statistics": bench_statistics,
}


def versions() -> dict[str, str]:
    """The versions of Python and of all packages compared, and the device."""
    installed = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for package in ("jdrop", "jax", "flax", "dm-haiku", "equinox", "torch"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


@click.command(help=__doc__)
@click.argument("benchmarks", nargs=-1, type=click.Choice([*BENCHMARKS]))
@click.option(
    "--json", "path", type=click.Path(path_type=Path), help="File to write the numbers to."
)
def main(benchmarks: tuple[str, ...], path: Path | None) -> None:
    """Runs the named benchmarks, or all."""
    results: dict[str, Any] = {"versions": versions()}
    click.echo(", ".join(f"{name} {value}" for name, value in results["versions"].items()))
    for name in benchmarks or BENCHMARKS:
        results[name] = BENCHMARKS[name]()
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
