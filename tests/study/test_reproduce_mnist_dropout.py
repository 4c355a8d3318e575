"""The recipes of dropout networks on MNIST: schedules, limits of norms, rows of the table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from idx_files import write_images

from jdrop.study.data import no_progress
from jdrop.study.models import Model
from jdrop.study.reproduce import classification, mnist_dropout, published
from jdrop.study.reproduce.mnist_dropout import OTHER_PAPER, RECIPES, Ramp, Recipe, make_optimizer
from jdrop.study.reproduce.protocol import Options, cells

STEPS = 6


def hyperparams(optimizer, params, num_steps):
    """The learning rate and the momentum of each step."""
    state = optimizer.init(params)
    shown = []
    for _ in range(num_steps):
        _, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        found = optax.tree.get(state, "hyperparams")
        shown.append((float(found["learning_rate"]), float(found["momentum"])))
    return np.array(shown)


@pytest.mark.parametrize("num_epochs", [440, 1])
def test_the_schedules_are_the_papers_compressed_into_the_epochs_that_train(num_epochs):
    """At epoch e of 440: 0.097259 * (1 - (1 - 0.022292) * e / 560), 0.5 + 0.199217 * e / 698."""
    params = {f"Dense_{layer}": {"kernel": jnp.ones((2, 2))} for layer in range(3)}
    optimizer = make_optimizer(RECIPES["898-1532"], num_epochs, STEPS)
    shown = hyperparams(optimizer, params, STEPS)
    epoch = np.arange(STEPS) / STEPS * 440 / num_epochs
    rate = 0.097259 * (1 - (1 - 0.022292) * epoch / 560)
    momentum = 0.5 + 0.199217 * epoch / 698
    # With one epoch, the ends of the ramps are rounded to whole steps: 7.64 to 8, and 9.52 to 10.
    rounding = 1e-5 if num_epochs == 440 else 0.05
    np.testing.assert_allclose(shown[:, 0], rate, rtol=rounding, atol=0.06 * rounding)
    np.testing.assert_allclose(shown[:, 1], momentum, rtol=rounding)


def test_a_ramp_ends_and_stays():
    recipe = Recipe((), (), 2, Ramp(1.0, 0.5, 1), Ramp(0.0, 0.9, 1))
    shown = hyperparams(make_optimizer(recipe, 2, 2), {"Dense_0": jnp.ones(1)}, 4)
    np.testing.assert_allclose(shown[:, 0], [1.0, 0.75, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(shown[:, 1], [0.0, 0.45, 0.9, 0.9], rtol=1e-6)


def test_an_old_step_keeps_its_learning_rate_in_the_velocity():
    """By hand: v1 = -1, w1 = -1; v2 = 0.5 * v1 - 0.5, w2 = -2."""
    recipe = Recipe((), (), 2, Ramp(1.0, 0.5, 1), Ramp(0.5, 0.5, 1))
    optimizer = make_optimizer(recipe, 2, 1)
    params = {"Dense_0": jnp.zeros(1)}
    state = optimizer.init(params)
    for expected in (-1.0, -2.0):
        updates, state = optimizer.update({"Dense_0": jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["Dense_0"], expected)


def test_published_errors_stand_in_the_rows_of_the_table():
    rows = {row for row, _ in published.MNIST_DROPOUT}
    assert rows == {*RECIPES, *OTHER_PAPER.values()}


@pytest.mark.parametrize("part", RECIPES)
def test_no_weights_into_a_unit_are_beyond_the_limit_of_their_layer(part):
    recipe = RECIPES[part]
    params = {
        f"Dense_{layer}": {"kernel": jnp.ones((50, 3)), "bias": jnp.ones(3)}
        for layer in range(len(recipe.hidden) + 1)
    }
    optimizer = make_optimizer(recipe, 1, STEPS)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    norms = [
        float(jnp.linalg.norm(layer["kernel"], axis=0).max())
        for layer in optax.apply_updates(params, updates).values()
    ]
    expected = {
        "898-1532": [4.378017, 2.970242, 4.626974],
        "3 x 1024": [50**0.5] * 4,
        "3 x 1024, max-norm": [2.0] * 4,
    }
    np.testing.assert_allclose(norms, expected[part], rtol=1e-5)


def test_the_initial_weights_are_those_of_the_recipe(getkey):
    recipe = RECIPES["898-1532"]
    network = Model(lambda: mnist_dropout.MLP(recipe.hidden, recipe.initial_kernels)).dropout
    params = network.init(getkey(), jnp.zeros((1, 784)))["params"]
    shapes = [params[f"Dense_{layer}"]["kernel"].shape for layer in range(3)]
    assert shapes == [(784, 898), (898, 1532), (1532, 10)]
    for layer, limit in enumerate((0.00891, 0.0575)):
        kernel = params[f"Dense_{layer}"]["kernel"]
        # All of 700,000 uniform weights miss the last hundredth with a probability of e^-7000.
        assert 0.99 * limit < float(kernel.max()) <= 1.001 * limit
        assert -0.99 * limit > float(kernel.min()) >= -1.001 * limit
    assert not params["Dense_2"]["kernel"].any()
    normal = RECIPES["3 x 1024"].initial_kernels[0](getkey(), (400, 1000), jnp.float32)
    # Seven standard deviations of the empirical one.
    assert abs(float(normal.std()) * 20 - 1) < 7 / np.sqrt(2 * normal.size)


def test_dropout_is_on_inputs_and_hidden_units(getkey):
    recipe = RECIPES["3 x 1024"]
    model = Model(lambda: mnist_dropout.MLP(recipe.hidden, recipe.initial_kernels))
    sites = model.sites(jnp.zeros((2, 784)))
    assert [(site.shape[1], site.rate) for site in sites] == [(784, 0.2), *[(1024, 0.5)] * 3]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder of few images, and narrow networks."""
    normal = RECIPES["3 x 1024"].initial_kernels[0]
    for part, recipe in RECIPES.items():
        narrow = Recipe(
            (6, 5),
            (normal,) * 3,
            recipe.num_epochs,
            recipe.learning_rate,
            recipe.momentum,
            recipe.norm_limits[:3],
        )
        monkeypatch.setitem(RECIPES, part, narrow)
    monkeypatch.setattr(mnist_dropout, "BATCH_SIZE", 10)
    monkeypatch.setattr(mnist_dropout, "NUM_SAMPLES", 3)
    write_images(tmp_path / "mnist")
    return tmp_path


def test_a_second_papers_numbers_have_a_row_with_the_same_readings(small):
    protocol = mnist_dropout.make_protocol()
    options = Options(small, splits=3, fraction=0.001)
    part = "3 x 1024, max-norm"
    result = protocol.run_part(part, options, no_progress)
    assert (result.epochs, result.paper_epochs) == (2, 1667)
    own, other = result.values[part], result.values["3 x 1024, max-norm, Ma et al."]
    assert set(own) | set(result.worth[part]) == set(protocol.measures)
    assert {len(numbers) for numbers in own.values()} == {3}
    assert other == {name: own[name] for name in ("scaling-error", "masks-error")}
    for score in classification.SCORES:
        np.testing.assert_allclose(
            own[f"difference-{score}"],
            np.subtract(own[f"masks-{score}"], own[f"scaling-{score}"]),
        )
    assert own["masks-nll"] != own["scaling-nll"]
    papers = {
        (cell.row, cell.measure): cell.paper.text
        for cell in cells(protocol, {part: result})
        if cell.paper is not None
    }
    assert papers == {
        (part, "scaling-error"): "1.06",
        ("3 x 1024, max-norm, Ma et al.", "scaling-error"): "1.05",
        ("3 x 1024, max-norm, Ma et al.", "masks-error"): "1.02",
    }
