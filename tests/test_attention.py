"""Attention: equal to JAX's own without dropout, and to the plain formula with dropout."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import mean_bound
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop import attention

pytestmark = pytest.mark.grid

clone = jax.random.clone

OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "window": {"local_window_size": 20},
    "window of two sizes": {"local_window_size": (30, 5), "is_causal": True},
    "lengths": {
        "query_seq_lengths": jnp.array([140, 300], jnp.int32),
        "key_value_seq_lengths": jnp.array([0, 201], jnp.int32),
    },
    "mask": {"mask": (2, 6, 300, 260)},
    "mask of keys": {"mask": (2, 1, 1, 260)},
    "mask of queries": {"mask": (6, 300, 1)},
    "bias": {"bias": (1, 6, 300, 260)},
    "bias of keys": {"bias": (260,)},
}


@pytest.fixture(params=OPTIONS)
def options(request, getkey):
    """Options of attention from 300 queries to 260 keys, 6 heads, 2 examples."""
    options = dict(OPTIONS[request.param])
    if "mask" in options:
        options["mask"] = jax.random.bernoulli(getkey(), 0.5, options["mask"])
    if "bias" in options:
        options["bias"] = jax.random.normal(getkey(), options["bias"])
    return options


def inputs(key, kv_heads=3, lengths=(300, 260), batch=2, heads=6, width=8, dtype="float32"):
    keys = jax.random.split(key, 3)
    q = jax.random.normal(keys[0], (batch, lengths[0], heads, width), dtype)
    k = jax.random.normal(keys[1], (batch, lengths[1], kv_heads, width), dtype)
    return q, k, jax.random.normal(keys[2], k.shape, dtype)


def plain_attention(drop_weights, q, k, v, options):
    """The formula, with all weights in memory at once."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, 2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * options.get("scale", q.shape[-1] ** -0.5)
    shape = scores.shape
    allowed = np.ones(shape, bool)
    query_index, key_index = np.arange(shape[2])[:, None], np.arange(shape[3])[None]
    if options.get("is_causal"):
        allowed &= (key_index <= query_index)[None, None]
    if "local_window_size" in options:
        before, after = np.broadcast_to(options["local_window_size"], 2)
        in_window = (key_index >= query_index - before) & (key_index <= query_index + after)
        allowed &= in_window[None, None]
    if "mask" in options:
        allowed &= np.broadcast_to(options["mask"], shape)
    if "key_value_seq_lengths" in options:
        kv_lengths = np.reshape(options["key_value_seq_lengths"], (-1, 1, 1, 1))
        allowed &= key_index[None, None] < kv_lengths
    if "query_seq_lengths" in options:
        q_lengths = np.reshape(options["query_seq_lengths"], (-1, 1, 1, 1))
        allowed &= query_index[None, None] < q_lengths
    if "bias" in options:
        scores = scores + jnp.broadcast_to(options["bias"], shape)
    weights = drop_weights(jax.nn.softmax(jnp.where(allowed, scores, -1e38)))
    y = jnp.einsum("bhts,bshd->bthd", weights, v)
    if "query_seq_lengths" in options:
        y *= np.arange(shape[2])[None, :, None, None] < q_lengths
    return y


def drop_in_blocks(key, rate, dims=()):
    """Dropout of all weights, with the masks that the docstring promises."""

    def drop(weights):
        batch, heads, length, keys = weights.shape
        size = min(length, 128)
        blocks = -(-length // size)
        shape = [1 if axis in dims else n for axis, n in enumerate((batch, heads, size, keys))]

        def draw_mask(i):
            block_key = jax.random.fold_in(clone(key), 0 if 2 in dims else i)
            return jnp.broadcast_to(
                jdrop.keep_mask(block_key, shape, rate), (batch, heads, size, keys)
            )

        # `map` compiles the draw once for all blocks.
        masks = jax.lax.map(draw_mask, jnp.arange(blocks))
        mask = jnp.moveaxis(masks, 0, 2).reshape(batch, heads, blocks * size, keys)
        return jdrop.apply_mask(mask[:, :, :length], weights, rate)

    return drop


def plain_with_dropout(key, q, k, v, dims=()):
    """The formula with dropout at the rate 0.3, compiled, since single operations take longer."""
    drop = drop_in_blocks(key, 0.3, dims)
    return jax.jit(lambda *x: plain_attention(drop, *x, {}))(q, k, v)


@partial(jax.jit, static_argnames="broadcast_dims")
def jdrop_attention(key, q, k, v, broadcast_dims=()):
    """jdrop's attention with dropout at the rate 0.3."""
    return jdrop.dot_product_attention(
        key, q, k, v, dropout_rate=0.3, broadcast_dims=broadcast_dims
    )


def value_and_gradients(f, q, k, v):
    weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    @jax.jit
    def run(*x):
        y, pull = jax.vjp(f, *x)
        return y, *pull(weights)

    return run(q, k, v)


def assert_all_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_attention_without_dropout_equals_jax_nn(options, getkey):
    q, k, v = inputs(getkey())
    ours = value_and_gradients(
        lambda *x: jdrop.dot_product_attention(None, *x, dropout_rate=0, **options), q, k, v
    )
    theirs = value_and_gradients(lambda *x: jax.nn.dot_product_attention(*x, **options), q, k, v)
    assert_all_close(ours, theirs)


def test_attention_with_dropout_equals_the_formula(options, getkey):
    (q, k, v), key = inputs(getkey()), getkey()

    def assert_same_at(rate):
        drop = drop_in_blocks(key, rate)
        expected = value_and_gradients(lambda *x: plain_attention(drop, *x, options), q, k, v)
        ours = value_and_gradients(
            lambda *x: jdrop.dot_product_attention(clone(key), *x, dropout_rate=rate, **options),
            q, k, v,
        )  # fmt: skip
        assert_all_close(ours, expected)

    assert_same_at(0.1)
    if not options:
        # At this rate a weight takes 1 random bit, not 16, whatever the options.
        assert_same_at(0.5)


def test_the_gradient_of_a_bias_equals_the_formula_with_more_keys_than_queries(getkey):
    (q, k, v), key = inputs(getkey(), lengths=(140, 200)), getkey()
    bias = jax.random.normal(getkey(), (6, 140, 200))

    def gradient(attention):
        return jax.jit(jax.grad(lambda bias: (attention(bias) ** 2).sum()))(bias)

    ours = gradient(
        lambda bias: jdrop.dot_product_attention(
            clone(key), q, k, v, bias, dropout_rate=0.3, is_causal=True
        )
    )
    drop = drop_in_blocks(key, 0.3)
    options = {"is_causal": True}
    expected = gradient(lambda bias: plain_attention(drop, q, k, v, options | {"bias": bias}))
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (2, 5, 0), (2, 200, 2)], ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_empty_arrays_give_empty_outputs(shape, rate, getkey):
    batch, length, heads = shape
    q = jnp.ones((batch, length, heads, 3))
    k = jnp.ones((batch, 4, max(heads, 1), 3))
    y = jdrop.dot_product_attention(getkey(), q, k, k, dropout_rate=rate)
    assert y.shape == q.shape


def test_scanned_layers_store_no_weights_for_the_backward_pass(getkey):
    """128 queries are a single block."""
    q, key = jax.random.normal(getkey(), (1, 128, 8, 8)), getkey()

    def loss(x):
        def layer(x, i):
            layer_key = jax.random.fold_in(key, i)
            return jdrop.dot_product_attention(layer_key, x, x, x, dropout_rate=0.1), None

        return jax.lax.scan(layer, x, jnp.arange(12))[0].sum()

    memory = jax.jit(jax.grad(loss)).lower(q).compile().memory_analysis().temp_size_in_bytes
    weights = 8 * 128 * 128 * 4
    assert memory < 12 * weights


@pytest.mark.parametrize("kv_heads", [1, 6])
def test_keys_may_have_fewer_heads_than_queries(kv_heads, getkey):
    (q, k, v), key = inputs(getkey(), kv_heads), getkey()
    ours = jdrop_attention(clone(key), q, k, v)
    expected = plain_with_dropout(key, q, k, v)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dims", [(0, 1), (2,), (-1,), (0, 1, 2, 3)])
@pytest.mark.parametrize("length", [40, 150])
def test_decisions_are_shared_along_broadcast_dims(dims, length, getkey):
    (q, k, v), key = inputs(getkey(), lengths=(length, 33)), getkey()
    ours = jdrop_attention(clone(key), q, k, v, broadcast_dims=dims)
    expected = plain_with_dropout(key, q, k, v, [dim % 4 for dim in dims])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("length", [1, 128, 129, 256])
def test_any_number_of_queries_equals_the_formula(length, getkey):
    (q, k, v), key = inputs(getkey(), lengths=(length, 17)), getkey()
    ours = jdrop_attention(clone(key), q, k, v)
    expected = plain_with_dropout(key, q, k, v)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)


def test_inputs_without_a_batch_axis_equal_a_batch_of_one(getkey):
    (q, k, v), key = inputs(getkey(), lengths=(129, 17)), getkey()
    unbatched = jdrop.dot_product_attention(clone(key), q[0], k[0], v[0], dropout_rate=0.3)
    batched = jdrop.dot_product_attention(clone(key), q[:1], k[:1], v[:1], dropout_rate=0.3)
    np.testing.assert_array_equal(unbatched, batched[0])


def attention_weights(q, k):
    return jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5)


@pytest.mark.slow
def test_the_mean_over_masks_is_attention_without_dropout(getkey):
    q, k, v = inputs(getkey(), lengths=(5, 7), batch=1, heads=3)
    n = 20000
    ys = jax.vmap(lambda key: jdrop.dot_product_attention(key, q, k, v, dropout_rate=0.3))(
        jax.random.split(getkey(), n)
    )
    expected = jax.nn.dot_product_attention(q, k, v)
    # The variance of a sum over keys, each kept with probability 0.7, is the sum of variances.
    squares = jnp.einsum("bhts,bshd->bthd", attention_weights(q, k) ** 2, v**2)
    bound = mean_bound(1.0, n) * np.sqrt(squares * 0.3 / 0.7)
    assert (np.abs(ys.mean(0) - expected) < bound + 1e-5).all()


def test_a_traced_rate_and_a_legacy_key_give_the_same_outputs(getkey):
    (q, k, v), key = inputs(getkey()), getkey()
    run = jax.jit(lambda rate: jdrop.dot_product_attention(clone(key), q, k, v, dropout_rate=rate))
    expected = jdrop.dot_product_attention(clone(key), q, k, v, dropout_rate=0.1)
    np.testing.assert_allclose(run(0.1), expected, rtol=1e-4, atol=1e-5)
    legacy = jdrop.dot_product_attention(jax.random.key_data(clone(key)), q, k, v, dropout_rate=0.1)
    np.testing.assert_array_equal(legacy, expected)


@pytest.mark.slow
def test_vmap_over_keys_equals_a_loop(getkey):
    (q, k, v), keys = inputs(getkey(), lengths=(150, 20)), jax.random.split(getkey(), 3)

    def run(key):
        return jdrop.dot_product_attention(key, q, k, v, dropout_rate=0.5)

    expected = jnp.stack([run(key) for key in clone(keys)])
    np.testing.assert_allclose(jax.vmap(run)(keys), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_outputs_keep_the_dtype_and_equal_the_formula(dtype, getkey):
    with jax.enable_x64(dtype == "float64"):
        (q, k, v), key = inputs(getkey(), dtype=dtype), getkey()
        y = jdrop_attention(clone(key), q, k, v)
        assert y.dtype == dtype
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        expected = plain_with_dropout(key, q, k, v)
        rtol = 1e-4 if dtype == "float64" else 5e-2
        np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=rtol, atol=rtol)


def test_second_derivatives_equal_the_formula(getkey):
    (q, k, v), key = inputs(getkey(), 1, (130, 3), 1, 1, 2), getkey()

    def energy(f):
        return jax.jit(jax.jacfwd(jax.grad(lambda v: (f(q, k, v) ** 3).sum())))(v)

    ours = energy(lambda *x: jdrop.dot_product_attention(clone(key), *x, dropout_rate=0.5))
    drop = drop_in_blocks(key, 0.5)
    expected = energy(lambda *x: plain_attention(drop, *x, {}))
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_the_gradient_takes_less_than_a_tenth_of_the_memory_of_jax_nn(getkey):
    (q, k, v), key = inputs(getkey(), 1, (4096, 4096), 1, 1, 64), getkey()

    def compiled(f):
        return jax.jit(jax.grad(lambda *x: (f(*x) ** 2).sum(), argnums=(0, 1, 2))).lower(q, k, v)

    ours = compiled(lambda *x: jdrop.dot_product_attention(key, *x, dropout_rate=0.1)).compile()
    plain = compiled(jax.nn.dot_product_attention).compile()
    temporary = [c.memory_analysis().temp_size_in_bytes for c in (ours, plain)]
    assert temporary[0] < temporary[1] / 10
    assert "4096,4096" not in ours.as_text()


def test_at_rate_zero_no_random_bits_are_drawn(getkey):
    q, k, v = inputs(getkey())
    run = jax.jit(lambda key: jdrop.dot_product_attention(key, q, k, v, dropout_rate=0.0))
    text = run.lower(getkey()).as_text()
    assert "xor" not in text
    assert "ui32" not in text


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("a"), P(None, None, "a")], ids=str)
def test_sharding_by_examples_or_heads_needs_no_collectives(axis_type, spec, getkey):
    (q, k, v), key = inputs(getkey(), 4, (150, 40), 4, 4), getkey()
    expected = jdrop.dot_product_attention(clone(key), q, k, v, dropout_rate=0.3)
    mesh = jax.make_mesh((4,), ("a",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        q, k, v = (jax.device_put(x, spec) for x in (q, k, v))
        run = jax.jit(lambda key, *x: jdrop.dot_product_attention(key, *x, dropout_rate=0.3))
        run = run.lower(clone(key), q, k, v).compile()
        np.testing.assert_allclose(run(clone(key), q, k, v), expected, rtol=1e-4, atol=1e-5)
        compiled = run.as_text()
    assert "all-to-all" not in compiled
    assert "collective-permute" not in compiled
    assert "all-gather" not in compiled


WRONG = {
    "rate": ({"dropout_rate": 1.0}, ValueError, "rate must lie in"),
    "rates": ({"dropout_rate": jnp.zeros(3)}, ValueError, "dropout_rate must be a scalar"),
    "key": ({"key": 3}, TypeError, "key must be a JAX random key"),
    "no key": ({"key": None}, TypeError, "key must be a JAX random key"),
    "rank": ({"q": jnp.ones((4, 8))}, ValueError, "q, k and v must all be"),
    "ranks": ({"v": jnp.ones((20, 3, 8))}, ValueError, "q, k and v must all be .* and v of"),
    "dtype": (
        {"k": jnp.ones((2, 20, 3, 8), jnp.bfloat16)},
        TypeError,
        "k must have the dtype of q",
    ),
    "batch": ({"q": jnp.ones((3, 10, 6, 8))}, ValueError, "q, k and v must be"),
    "width": ({"q": jnp.ones((2, 10, 6, 7))}, ValueError, "q, k and v must be"),
    "length": ({"v": jnp.ones((2, 21, 3, 8))}, ValueError, "q, k and v must be"),
    "heads": ({"q": jnp.ones((2, 10, 7, 8))}, ValueError, "multiple"),
    "mask": ({"mask": jnp.ones((10, 20))}, TypeError, "mask must be Boolean"),
    "mask's shape": ({"mask": jnp.ones((10, 21), bool)}, ValueError, "mask must be broadcastable"),
    "bias": ({"bias": jnp.ones((9, 20))}, ValueError, "bias must be broadcastable"),
    "lengths": ({"query_seq_lengths": jnp.ones(3, int)}, ValueError, "query_seq_lengths must be"),
    "dtype of lengths": (
        {"key_value_seq_lengths": jnp.ones(2)},
        ValueError,
        "key_value_seq_lengths must be",
    ),
    "dims": ({"broadcast_dims": (4,)}, ValueError, "broadcast_dims must lie"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_arguments_raise_and_are_named(name, getkey):
    changed, error, message = WRONG[name]
    q, k, v = inputs(getkey(), lengths=(10, 20))
    arguments = {"key": getkey(), "q": q, "k": k, "v": v, "dropout_rate": 0.1} | changed
    with pytest.raises(error, match=message):
        jdrop.dot_product_attention(**arguments)


@pytest.mark.parametrize("size", [(1, 2, 3), 1.5, (2,), (1, 2.0)], ids=str)
def test_a_window_must_be_an_integer_or_a_pair(size):
    # In the tests jaxtyping refuses such a window before the public function can.
    with pytest.raises(ValueError, match="local_window_size must be"):
        attention._checked_window(size)


# Flax's layers.


@pytest.mark.parametrize("rate", [-0.1, float("nan"), 1.5, 50.0])
def test_a_layer_refuses_a_rate_out_of_range(rate):
    with pytest.raises(ValueError, match="rate must lie in"):
        jdrop.linen.MultiHeadDotProductAttention(num_heads=2, dropout_rate=rate)
    with pytest.raises(ValueError, match="rate must lie in"):
        jdrop.nnx.MultiHeadAttention(2, 8, dropout_rate=rate, decode=False, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_the_linen_layer_equals_flax_without_dropout(lead, getkey):
    x = jax.random.normal(getkey(), (*lead, 140, 8))
    ours = jdrop.linen.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.4)
    theirs = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.4)
    variables = theirs.init(getkey(), x, deterministic=True)
    mask = nn.make_causal_mask(x[..., 0])
    lower = jnp.tril(jnp.ones((140, 140), bool))

    def outputs(layer):
        @jax.jit
        def apply(variables, x):
            return [
                layer.apply(variables, x, deterministic=True, **arguments)
                for arguments in ({}, {"mask": mask}, {"mask": lower})
            ]

        return apply(variables, x)

    for actual, expected in zip(outputs(ours), outputs(theirs), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_nnx_layer_equals_flax_without_dropout(getkey):
    x = jax.random.normal(getkey(), (2, 140, 8))
    arguments = {"num_heads": 2, "in_features": 8, "dropout_rate": 0.4, "decode": False}
    ours = jdrop.nnx.MultiHeadAttention(**arguments, rngs=nnx.Rngs(0))
    theirs = nnx.MultiHeadAttention(**arguments, rngs=nnx.Rngs(0))
    for causal in (False, True):
        np.testing.assert_allclose(
            ours(x, deterministic=True, is_causal=causal),
            theirs(x, deterministic=True, is_causal=causal),
            rtol=1e-4,
            atol=1e-5,
        )


def examples_differ(y):
    return not np.allclose(y[0], y[1], atol=1e-4)


@pytest.mark.slow
def test_each_example_has_its_own_mask_in_the_linen_layer(getkey):
    x = jnp.broadcast_to(jax.random.normal(getkey(), (1, 10, 8)), (2, 10, 8))
    layer = jdrop.linen.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.4)
    variables = layer.init(getkey(), x, deterministic=True)
    rngs = {"dropout": getkey()}
    assert examples_differ(layer.apply(variables, x, deterministic=False, rngs=rngs))
    shared = layer.clone(broadcast_dropout=True)
    rngs = {"dropout": getkey()}
    assert not examples_differ(shared.apply(variables, x, deterministic=False, rngs=rngs))


@pytest.mark.slow
def test_each_example_has_its_own_mask_in_the_nnx_layer(getkey):
    x = jnp.broadcast_to(jax.random.normal(getkey(), (1, 10, 8)), (2, 10, 8))
    for shared in (False, True):
        layer = jdrop.nnx.MultiHeadAttention(
            2, 8, dropout_rate=0.4, decode=False, rngs=nnx.Rngs(0), broadcast_dropout=shared
        )
        assert examples_differ(layer(x, deterministic=False)) != shared


def test_layers_refuse_options_that_need_all_weights(getkey):
    x = jnp.ones((2, 10, 8))
    layer = jdrop.linen.MultiHeadDotProductAttention(num_heads=2)
    variables = layer.init(getkey(), x)
    with pytest.raises(ValueError, match="sow_weights must be False"):
        layer.apply(variables, x, sow_weights=True)
    with pytest.raises(ValueError, match="qk_attn_weights_einsum_cls"):
        layer.clone(qk_attn_weights_einsum_cls=lambda: jnp.einsum).apply(variables, x)
    with pytest.raises(ValueError, match="sow_weights must be False"):
        jdrop.nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))(x, sow_weights=True)


def test_decoding_step_by_step_equals_flax(getkey):
    x = jax.random.normal(getkey(), (2, 5, 8))
    ours = jdrop.linen.MultiHeadDotProductAttention(num_heads=2, decode=True)
    theirs = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    variables = theirs.init(getkey(), x)
    for layer in (ours, theirs):
        state, outputs = variables, []
        apply = jax.jit(partial(layer.apply, mutable=["cache"]))
        for i in range(5):
            y, cache = apply(state, x[:, i : i + 1])
            state = {**variables, **cache}
            outputs.append(y)
        if layer is ours:
            expected = outputs
    np.testing.assert_allclose(jnp.stack(outputs), jnp.stack(expected), rtol=1e-4, atol=1e-5)
