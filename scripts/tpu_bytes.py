"""Counts what dropout would move through a TPU's memory, with the TPU's compiler. No TPU is needed.

The compiler comes with the package `libtpu` and compiles for a named TPU on any Linux machine:

    python -m venv tpu
    tpu/bin/pip install jax libtpu click -e .
    tpu/bin/python scripts/tpu_bytes.py

`bytes` are those that all operations read and write, `operations` those of arithmetic, both as the
compiler counts them, and `temporary` is the memory for intermediate results. Nothing is timed.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

# Before JAX is imported. There is no TPU here, and the compiler must not ask the network for one.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import click
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jdrop

Dropout = Callable[[Array, Array], Array]
"""`dropout(key, x)`, at a fixed rate."""

NUM_BITS = {0.5: 1, 0.25: 2, 0.1: 15}
"""Rates, and how many random bits each draws for an element."""

RATES = tuple(NUM_BITS)

OP_LIMITS = {
    (4096, 4096): 1.1, (8, 1024, 1024): 1.1, (32, 512, 4096): 1.1, (32, 197, 768): 1.35,
    (8, 1023, 768): 1.35, (32, 14, 14, 768): 1.35, (2**24,): 1.7,
}  # fmt: skip
"""For each shape, how many times the bytes of `x * c` a dropout may move."""

MAX_GENERATED = 1.5
"""The same for keys of a hardware generator, with the random words written and read once."""

MAX_BLOCK = 1.03
"""How many times the bytes and the memory of no dropout a block or attention may take."""

BATCH, LENGTH, WIDTH, HEADS, DEPTH = 8, 1024, 768, 12, 12

LONG = 4096
"""A second length of attention."""

NUM_KEYS = 8192
"""Keys that are vmapped, each with a mask of `WIDTH` elements."""


class Cost(NamedTuple):
    """What the compiler counts in a program."""

    mib: float
    gigaoperations: float
    temporary_mib: float


class Compiler:
    """Compiles functions for one device of a TPU.

    Args:
        topology: the name of a TPU, such as "v5e:2x2".
    """

    def __init__(self, topology: str) -> None:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        self._sharding = NamedSharding(Mesh(np.array(devices[:1]), ("device",)), PartitionSpec())

    def cost(self, function: Callable[..., Any], *inputs: Any) -> Cost:
        """Returns the cost of `function(*inputs)`, for inputs that may be abstract."""
        jitted = jax.jit(function, in_shardings=self._sharding, out_shardings=self._sharding)
        compiled = jitted.lower(*inputs).compile()
        counted = compiled.cost_analysis()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        return Cost(counted["bytes accessed"] / 2**20, counted["flops"] / 1e9, temporary / 2**20)


def abstract_key(impl: str) -> Any:
    """A key without a value."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl))


def jdrop_dropout(rate: float) -> Dropout:
    """The function of jdrop."""
    return lambda key, x: jdrop.dropout(key, x, rate)


def flax_dropout(rate: float) -> Dropout:
    """The layer of Flax, with an explicit key."""
    layer = nn.Dropout(rate, deterministic=False)
    return lambda key, x: layer.apply({}, x, rng=key)


def count_op(compiler: Compiler, impl: str) -> int:
    """Prints the costs of single dropouts. Returns how many are above their limit."""
    click.echo(f"\nop, keys of {impl}: multiples of x * c, of Flax's dropout; MiB")
    click.echo(f"{'':32s}     bytes   (limit)      Flax's  operations / Flax's  temporary")
    key, above = abstract_key(impl), 0
    for dtype in (jnp.float32, jnp.bfloat16):
        for shape, limit in OP_LIMITS.items():
            x = jax.ShapeDtypeStruct(shape, dtype)
            floor = compiler.cost(lambda key, x: x * jnp.asarray(2, x.dtype), key, x).mib
            for rate in RATES:
                cost = compiler.cost(jdrop_dropout(rate), key, x)
                flax = compiler.cost(flax_dropout(rate), key, x)
                most = limit * floor
                if impl != "threefry2x32":
                    # The words of the generator are written and read.
                    words = NUM_BITS[rate] * x.size / 32 * 4 / 2**20
                    most = MAX_GENERATED * floor + 2 * words
                is_above = cost.mib > most
                above += is_above
                click.echo(
                    f"{dtype.__name__:9s}{shape!s:18s} {rate:<5}{cost.mib / floor:9.2f}"
                    f"{most / floor:10.2f}{flax.mib / floor:12.2f}"
                    f"{cost.gigaoperations / flax.gigaoperations:22.2f}{cost.temporary_mib:11.2f}"
                    f"{'  above' * is_above}"
                )
    return above


def norm(x: Array) -> Array:
    """Normalises the last axis, in float32."""
    centred = x.astype(jnp.float32) - jnp.mean(x, -1, keepdims=True, dtype=jnp.float32)
    scale = lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
    return (centred * scale).astype(x.dtype)


def block(params: dict[str, Array], x: Array, key: Array, rate: float) -> Array:
    """A transformer block with dropout of the attention's weights and of both branches."""
    attention_key, mixed_key, hidden_key = jax.random.split(key, 3)
    query, keys, value = (
        (norm(x) @ params[name]).reshape(*x.shape[:2], HEADS, WIDTH // HEADS)
        for name in ("query", "key", "value")
    )
    mixed = jdrop.dot_product_attention(attention_key, query, keys, value, dropout_rate=rate)
    x = x + jdrop.dropout(mixed_key, mixed.reshape(x.shape) @ params["out"], rate)
    hidden = jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]
    return x + jdrop.dropout(hidden_key, hidden, rate)


def print_ratios(rate: float, cost: Cost, none: Cost) -> bool:
    """Prints a cost as multiples of no dropout. Returns whether it is above `MAX_BLOCK`."""
    ratios = cost.mib / none.mib, cost.temporary_mib / none.temporary_mib
    is_above = max(ratios) > MAX_BLOCK
    click.echo(
        f"rate {rate}: bytes {ratios[0]:.3f} of {none.mib:.0f} MiB, temporary {ratios[1]:.3f} "
        f"of {none.temporary_mib:.1f} MiB, operations "
        f"{cost.gigaoperations / none.gigaoperations:.3f}{'  above' * is_above}"
    )
    return is_above


def count_blocks(compiler: Compiler, depth: int) -> int:
    """Prints the costs of the gradient of blocks. Returns how many are above their limit.

    One block is called as it is; more are scanned.
    """
    click.echo(f"\ngradient of {depth} block(s): multiples of no dropout")
    shapes = {name: (WIDTH, WIDTH) for name in ("query", "key", "value", "out")}
    shapes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    lead = () if depth == 1 else (depth,)
    params = {
        name: jax.ShapeDtypeStruct((*lead, *shape), jnp.bfloat16) for name, shape in shapes.items()
    }
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.bfloat16)
    key = abstract_key("threefry2x32")

    def gradient(rate: float) -> Callable[..., Any]:
        def loss(params: dict[str, Array], x: Array, key: Array) -> Array:
            if depth == 1:
                y = block(params, x, key, rate)
            else:

                def step(x: Array, inputs: tuple[dict[str, Array], Array]) -> tuple[Array, None]:
                    return block(inputs[0], x, inputs[1], rate), None

                y, _ = lax.scan(step, x, (params, jax.random.split(key, depth)))
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1))

    none = compiler.cost(gradient(0.0), params, x, key)
    return sum(
        print_ratios(rate, compiler.cost(gradient(rate), params, x, key), none)
        for rate in (0.1, 0.5)
    )


def count_attention(compiler: Compiler) -> int:
    """Prints the costs of the gradient of attention. Returns how many are above their limit."""

    def gradient(rate: float) -> Callable[..., Any]:
        def loss(query: Array, keys: Array, value: Array, key: Array) -> Array:
            y = jdrop.dot_product_attention(key, query, keys, value, dropout_rate=rate)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1, 2))

    above = 0
    for length in (LENGTH, LONG):
        click.echo(f"\ngradient of attention, length {length}: multiples of no dropout")
        x = jax.ShapeDtypeStruct((BATCH, length, HEADS, WIDTH // HEADS), jnp.bfloat16)
        inputs = x, x, x, abstract_key("threefry2x32")
        none = compiler.cost(gradient(0.0), *inputs)
        for rate in (0.1, 0.5):
            above += print_ratios(rate, compiler.cost(gradient(rate), *inputs), none)
    return above


def count_vmap(compiler: Compiler) -> int:
    """Prints the costs of masks of one axis, vmapped over keys. They have no limit."""
    click.echo(f"\nvmap over {NUM_KEYS} keys, {WIDTH} elements each: multiples of x * c; MiB")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), NUM_KEYS))
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((NUM_KEYS, WIDTH), dtype)
        floor = compiler.cost(lambda keys, x: x * jnp.asarray(2, x.dtype), keys, x).mib
        cost = compiler.cost(jax.vmap(jdrop_dropout(0.1)), keys, x)
        click.echo(
            f"{dtype.__name__:9s} 0.1  bytes {cost.mib / floor:.2f}, "
            f"temporary {cost.temporary_mib:.2f}"
        )
    return 0


PARTS: dict[str, Callable[[Compiler], int]] = {
    "op": lambda compiler: count_op(compiler, "threefry2x32"),
    "rbg": lambda compiler: count_op(compiler, "rbg"),
    "block": lambda compiler: count_blocks(compiler, 1),
    "scan": lambda compiler: count_blocks(compiler, DEPTH),
    "attention": count_attention,
    "vmap": count_vmap,
}


@click.command(help=__doc__)
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--topology", default="v5e:2x2", show_default=True, help="Which TPU.")
def main(parts: tuple[str, ...], topology: str) -> None:
    """Prints the named parts, or all. The exit status is 1 if a limit is passed."""
    compiler = Compiler(topology)
    above = sum(PARTS[part](compiler) for part in parts or PARTS)
    click.echo(f"\n{topology}: {above} above their limit")
    raise SystemExit(above > 0)


if __name__ == "__main__":
    main()
