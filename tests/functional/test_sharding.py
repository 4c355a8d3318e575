"""The mask is the same for every sharding, and devices exchange nothing to draw it."""

import contextlib
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from dropouts import Case, assert_same_bits, channel_rates
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdrop
from jdrop import functional

pytestmark = pytest.mark.grid

clone = jax.random.clone


SPECS = [P("a", "b"), P(("b", "a"), None), P(None, "b")]


def make_mesh(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type, axis_type))


@pytest.fixture
def wide_x() -> Array:
    return jax.random.normal(jax.random.key(1207), (16, 8))


SHARDED_CASES = [
    Case(0.3), Case(0.5, (0,)), Case(0.3, (0, 1), False),
    Case((0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)),
    Case((0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0), (0,)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED_CASES, ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_explicit_sharding_does_not_change_output_or_gradient(case, jit, wide_x, getkey):
    def output_and_gradient(key: Array, x: Array) -> tuple[Array, Array]:
        y, pull = jax.vjp(lambda x: case(key, x), x)
        return y, pull(x)[0]

    def run_each(key: Array, xs: list[Array]) -> list[tuple[Array, Array]]:
        return [output_and_gradient(clone(key), x) for x in xs]

    key = getkey()
    expected = case(clone(key), wide_x)
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        # Without `jit` a single sharding suffices: it compiles the same programs, but slowly.
        xs = [jax.device_put(wide_x, spec) for spec in (SPECS if jit else SPECS[:1])]
        results = (jax.jit(run_each) if jit else run_each)(clone(key), xs)
    for x, (y, gradient) in zip(xs, results, strict=True):
        for result in (y, gradient):
            assert jax.typeof(result).sharding.spec == jax.typeof(x).sharding.spec
            assert result.sharding.is_equivalent_to(x.sharding, 2)
            # Dropout with a fixed key is a diagonal map, so its transpose gives the same output.
            assert_same_bits(result, expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dims", [(), (0,), (1,), (0, 1)])
def test_a_mask_has_the_explicit_sharding_of_the_input(spec, dims, wide_x, getkey):
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        shape = functional.mask_shape(wide_x.shape, dims)
        mask = functional.draw_mask(getkey(), shape, 0.3, like=jax.device_put(wide_x, spec))
        expected = P(*(None if axis in dims else name for axis, name in enumerate(spec)))
        assert jax.typeof(mask).sharding.spec == expected


@pytest.mark.parametrize("case", SHARDED_CASES, ids=str)
def test_automatic_sharding_does_not_change_the_output(case, wide_x, getkey):
    key = getkey()
    expected = case(clone(key), wide_x)
    shardings = [NamedSharding(make_mesh(AxisType.Auto), spec) for spec in SPECS]

    def run_each(key: Array, xs: list[Array]) -> list[Array]:
        return [case(clone(key), x) for x in xs]

    xs = [jax.device_put(wide_x, sharding) for sharding in shardings]
    for y in jax.jit(run_each, out_shardings=shardings)(clone(key), xs):
        assert_same_bits(y, expected)


SHARDINGS = [
    ((24, 100), P(("a", "b"))), ((8, 13), P(("a", "b"))), ((8, 1), P(("a", "b"))),
    ((40000,), P(("a", "b"))), ((64, 1000), P("a", "b")), ((8, 8, 257), P("a", "b")),
    ((16, 64, 256), P("a", "b")), ((16, 64, 256), P(None, "a", "b")), ((16, 3, 1024), P("a")),
    ((128, 1024), P("a", "b")), ((128, 1024), P(None, ("a", "b"))), ((128, 1024), P("b")),
    ((8, 24576), P(None, ("a", "b"))), ((8, 197, 64), P("a", None, "b")),
    ((512, 4096), P(("a", "b"))), ((512, 4096), P("b", "a")),
]  # fmt: skip
"""Along each axis, shards that are whole groups of rows and shards that are not."""


def collectives(compiled: Any) -> set[str]:
    names = (
        r"all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    )
    return set(re.findall(names, compiled.as_text()))


@pytest.mark.parametrize(
    ("axis_type", "rate"),
    [(AxisType.Auto, 0.5), (AxisType.Auto, 0.1), (AxisType.Explicit, 0.1)],
)
@pytest.mark.parametrize(("shape", "spec"), SHARDINGS, ids=str)
def test_sharded_dropout_needs_no_collectives(shape, spec, rate, axis_type, getkey):
    key, x = getkey(), jnp.ones(shape)
    mesh = make_mesh(axis_type)
    sharding = NamedSharding(mesh, spec)

    def output_and_gradient(key: Array, x: Array) -> tuple[Array, Array]:
        y, pull = jax.vjp(lambda x: jdrop.dropout(key, jnp.sin(x), rate), x)
        return y, pull(y)[0]

    expected = jdrop.dropout(clone(key), jnp.sin(x), rate)
    with jax.set_mesh(mesh) if axis_type == AxisType.Explicit else contextlib.nullcontext():
        sharded = jax.device_put(x, sharding)
        run = jax.jit(output_and_gradient, out_shardings=sharding)
        compiled = run.lower(clone(key), sharded).compile()
        assert not collectives(compiled)
        assert_same_bits(compiled(clone(key), sharded)[0], expected)


OWN_SHARES = [
    ((100, 64), P(None, ("a", "b"))), ((8, 40, 16), P(None, None, "b")), ((512, 64), P("a", "b")),
    ((8, 40, 16), P("a", None, "b")), ((8, 256, 16), P(None, "a", "b")), ((2**15,), P("a")),
    ((64, 4, 16), P(("a", "b"))),
]  # fmt: skip
"""Columns in any shards, and rows in shards of whole groups."""


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("shape", "spec"), OWN_SHARES, ids=str)
def test_a_device_hashes_the_words_of_its_own_share_alone(shape, spec, axis_type, getkey):
    mesh = make_mesh(axis_type)
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones(shape), sharding)
        run = jax.jit(lambda key, x: jdrop.dropout(key, x, 0.5), out_shardings=sharding)
        compiled = run.lower(getkey(), x).compile()
    share = math.prod(sharding.shard_shape(shape))
    sizes = re.findall(r"u32\[([0-9,]+)\]\S* xor\(", compiled.as_text())
    # With 2 parts for each word of 32 rows, of which some may be unused.
    assert 0 < max(math.prod(map(int, size.split(","))) for size in sizes) <= 2 * share / 16


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dims", [(), (0,), (1,), (2,), (0, 2)])
def test_sharded_dropout_with_broadcast_dims_or_channel_rates_needs_no_collectives(
    dims, axis_type, getkey
):
    mesh, key = make_mesh(axis_type), getkey()
    rates = jnp.linspace(0.0, 0.9, 24)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 20, 24)), NamedSharding(mesh, P("a", "b")))
        run = jax.jit(
            lambda key, x: [
                jdrop.dropout(clone(key), x, rate, broadcast_dims=dims)
                for rate in ((0.1, rates) if 2 not in dims else (0.1,))
            ],
            out_shardings=x.sharding,
        )
        assert not collectives(run.lower(clone(key), x).compile())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_vmap_over_a_sharded_member_axis_needs_no_collectives(axis_type, getkey):
    mesh, keys = make_mesh(axis_type), jax.random.split(getkey(), 8)
    with jax.set_mesh(mesh):
        keys = jax.device_put(keys, P("a"))
        xs = jax.device_put(jnp.ones((8, 50, 100)), P("a", "b"))
        run = jax.jit(
            jax.vmap(lambda key, x: jdrop.dropout(key, x, 0.1)), out_shardings=xs.sharding
        )
        assert not collectives(run.lower(keys, xs).compile())


@pytest.mark.parametrize("spec", [P("b"), P("a"), P(None)], ids=str)
def test_sharded_rates_do_not_change_the_output(spec, wide_x, getkey):
    key = getkey()
    expected = jdrop.dropout(clone(key), wide_x, channel_rates(8))
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        x = jax.device_put(wide_x, P(None, *spec))
        y = jdrop.dropout(clone(key), x, jax.device_put(channel_rates(8), spec))
    assert_same_bits(y, expected)


def test_vmap_over_an_explicitly_sharded_member_axis_equals_a_loop(wide_x, getkey):
    keys = jax.random.split(getkey(), 4)
    xs = jnp.stack([wide_x] * 4)
    expected = jnp.stack([jdrop.dropout(key, wide_x, 0.3) for key in clone(keys)])
    for spec in (P("a"), P("a", "b"), P(None, "a", "b"), P("b", "a")):
        with jax.set_mesh(make_mesh(AxisType.Explicit)):
            sharded_keys = jax.device_put(clone(keys), P(*spec[:1]))
            sharded = jax.device_put(xs, spec)
            run = jax.jit(jax.vmap(lambda key, x: jdrop.dropout(key, x, 0.3)))
            y = run(sharded_keys, sharded)
            assert jax.typeof(y).sharding.spec == jax.typeof(sharded).sharding.spec
        assert_same_bits(y, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", SHARDED_CASES[:3], ids=str)
def test_shard_map_with_a_key_for_each_shard_equals_a_loop_over_shards(
    axis_type, case, wide_x, getkey
):
    key = getkey()

    def local(key: Array, x: Array) -> Array:
        return case(jax.random.fold_in(key, jax.lax.axis_index("a")), x)

    blocks = jnp.split(wide_x, 4)
    expected = jnp.concatenate(
        [case(jax.random.fold_in(clone(key), i), block) for i, block in enumerate(blocks)]
    )
    with jax.set_mesh(make_mesh(axis_type)):
        run = jax.shard_map(local, in_specs=(P(), P("a")), out_specs=P("a"))
        x = jax.device_put(wide_x, P("a"))
        assert_same_bits(jax.jit(run)(clone(key), x), expected)


def test_shard_map_with_a_shared_key_shares_the_mask(wide_x, getkey):
    key = getkey()
    blocks = jnp.split(wide_x, 4)
    expected = jnp.concatenate([jdrop.dropout(clone(key), block, 0.3) for block in blocks])
    with jax.set_mesh(make_mesh(AxisType.Auto)):
        run = jax.shard_map(
            lambda key, x: jdrop.dropout(key, x, 0.3), in_specs=(P(), P("a")), out_specs=P("a")
        )
        assert_same_bits(jax.jit(run)(clone(key), wide_x), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shard_map_over_some_axes_with_a_shared_key_shares_the_mask(axis_type, wide_x, getkey):
    key = getkey()
    blocks = jnp.split(wide_x, 4)
    expected = jnp.concatenate([jdrop.dropout(clone(key), block, 0.3) for block in blocks])
    with jax.set_mesh(make_mesh(axis_type)):
        run = jax.shard_map(
            lambda key, x: jdrop.dropout(key, x, 0.3),
            in_specs=(P(), P("a")),
            out_specs=P("a"),
            axis_names={"a"},
        )
        x = jax.device_put(wide_x, P("a", "b"))
        assert_same_bits(jax.jit(run)(clone(key), x), expected)


# Branches that are not computed for the samples they drop.


def drop_branch_and_gradient(key: Array, x: Array, per_sample: bool) -> tuple[Array, Array]:
    def drop(x: Array) -> Array:
        return jdrop.drop_branch(key, lambda x: 2 * x + 1, x, 0.3, per_sample=per_sample)

    y, pull = jax.vjp(drop, x)
    return y, pull(x)[0]


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharding_does_not_change_which_samples_a_branch_drops(
    axis_type, per_sample, wide_x, getkey
):
    key = getkey()
    expected = drop_branch_and_gradient(clone(key), wide_x, per_sample)

    def run_each(key: Array, xs: list[Array]) -> list[tuple[Array, Array]]:
        return [drop_branch_and_gradient(clone(key), x, per_sample) for x in xs]

    with jax.set_mesh(make_mesh(axis_type)):
        xs = [jax.device_put(wide_x, spec) for spec in SPECS]
        results = jax.jit(run_each)(clone(key), xs)
    for x, (y, gradient) in zip(xs, results, strict=True):
        assert_same_bits(y, expected[0])
        assert_same_bits(gradient, expected[1])
        if axis_type == AxisType.Explicit:
            # So that a residual connection can add the branch.
            assert jax.typeof(y).sharding == jax.typeof(x).sharding


def test_shard_map_drops_the_samples_that_each_device_holds(wide_x, getkey):
    key, sizes = getkey(), set()

    def branch(x: Array) -> Array:
        sizes.add(len(x))
        return 2 * x + 1

    def local(key: Array, x: Array) -> Array:
        return jdrop.drop_branch(jax.random.fold_in(key, jax.lax.axis_index("a")), branch, x, 0.5)

    expected = [
        jdrop.drop_branch(jax.random.fold_in(clone(key), i), branch, block, 0.5)
        for i, block in enumerate(jnp.split(wide_x, 4))
    ]
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        run = jax.shard_map(local, in_specs=(P(), P("a")), out_specs=P("a"))
        compiled = jax.jit(run).lower(clone(key), jax.device_put(wide_x, P("a"))).compile()
        assert_same_bits(
            compiled(clone(key), jax.device_put(wide_x, P("a"))), jnp.concatenate(expected)
        )
    assert not collectives(compiled)
    assert sizes == {2}
