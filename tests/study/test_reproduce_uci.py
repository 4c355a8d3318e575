"""The protocols on UCI tables: splits, networks of all splits at once, their readings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jdrop.network import Network
from jdrop.study.data import DataError, no_progress
from jdrop.study.reproduce import (
    regression,
    uci,
    uci_dropout,
    uci_ensemble_of_ten,
    uci_ensembles,
)
from jdrop.study.reproduce.protocol import Options
from jdrop.study.reproduce.regression import Members, Readings
from jdrop.train import gaussian_nll

TABLE = uci.Table("Tiny", "tiny.txt", num_rows=60, num_features=3, num_splits=4)


@pytest.fixture
def data_dir(tmp_path):
    """A table with a constant column and a column beyond the target."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 3)) * [1.0, 20.0, 0.0] + [0.0, 5.0, 7.0]
    y = 3 * x[:, 0] - 0.1 * x[:, 1] + 100
    np.savetxt(tmp_path / "tiny.txt", np.column_stack([x, y, np.zeros(60)]))
    return tmp_path


@pytest.fixture
def splits(data_dir):
    return uci.load_splits(TABLE, data_dir, 4)


def members_of(split, rate=0.0, weight_decay=0.0, noise_variance=0.5):
    split = np.asarray(split)
    values = (np.full(len(split), value) for value in (rate, weight_decay, noise_variance))
    return Members(split, *values)


def fit(key, splits, members, **changes):
    settings = {
        "network": regression.one_hidden_layer(8),
        "optimizer": regression.adam_with_penalty(1e-2),
        "loss_fn": regression.squared_error,
        "num_epochs": 3,
        "batch_size": 16,
        "progress": no_progress,
    }
    return regression.fit(key, splits=splits, members=members, **{**settings, **changes})


def test_splits_are_those_that_every_paper_uses(data_dir, splits):
    """The same generator draws a permutation for each split, in turn."""
    numbers = np.loadtxt(data_dir / "tiny.txt")
    generator = np.random.RandomState(1)
    for split in range(4):
        order = generator.choice(range(60), 60, replace=False)
        target = numbers[order, 3]
        scale = target[:54].std()
        np.testing.assert_allclose(splits.target_scale[split], scale)
        expected = (target - target[:54].mean()) / scale
        np.testing.assert_allclose(splits.train_targets[split], expected[:54], atol=1e-6)
        np.testing.assert_allclose(splits.test_targets[split], expected[54:], atol=1e-6)


def test_fewer_splits_are_the_first_ones(data_dir, splits):
    few = uci.load_splits(TABLE, data_dir, 2)
    np.testing.assert_array_equal(few.test_inputs, splits.test_inputs[:2])


def test_inputs_are_standardised_by_the_training_rows(splits):
    np.testing.assert_allclose(splits.train_inputs[..., :2].mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(splits.train_inputs[..., :2].std(1), 1, atol=1e-6)
    np.testing.assert_array_equal(splits.train_inputs[..., 2], 0)


def test_validation_takes_rows_of_the_training_part_only(data_dir):
    numbers = np.loadtxt(data_dir / "tiny.txt")
    validation = uci.validation_splits(numbers, 3, 2)
    assert validation.train_targets.shape == (2, 43)
    assert validation.test_targets.shape == (2, 11)
    rows = uci.ordered_rows(numbers, 3, 2)
    expected = uci.standardised(rows[:, :43], rows[:, 43:54])
    np.testing.assert_array_equal(validation.test_inputs, expected.test_inputs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b c d\n", "must hold a table of numbers without a header"),
        ("1 2 3 4\n" * 59, "must have 60 rows with 3 features and the target, got 59 rows of 4"),
        ("1 2 3\n" * 60, "got 60 rows of 3 columns"),
        ("1 2 3 nan\n" * 60, "must hold finite numbers"),
    ],
)
def test_another_table_is_refused(tmp_path, text, message):
    (tmp_path / "tiny.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        uci.load_splits(TABLE, tmp_path, 2)


@pytest.mark.slow
def test_a_member_does_not_depend_on_the_others(getkey, splits):
    key = getkey()
    alone = fit(jax.random.clone(key), splits, members_of([2], rate=0.1))
    first = fit(key, splits, members_of([2, 0, 1], rate=0.1))
    for one, three in zip(jax.tree.leaves(alone), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(one[0], three[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "batch_size", "expected"),
    [
        # 54 rows are three steps of 16 and one of 6; each loss is the mean over its own rows.
        ("ones", 16, 4.0),
        # Steps of one row add up to the sum of all rows.
        ("index", 1, 54 * 53 / 2),
    ],
)
def test_an_epoch_has_every_row_once_and_keeps_the_last_batch(
    getkey, splits, target, batch_size, expected
):
    """The loss is linear in the only parameter, so that its steps add up the mean targets."""

    def apply_fn(variables, inputs, key):
        return jnp.broadcast_to(variables["params"], inputs.shape[:1]), jnp.ones(len(inputs))

    def init_fn(key, inputs):
        return {"params": jnp.zeros(()), "rate": jnp.zeros(()), "noise_variance": jnp.ones(())}

    def make_optimizer(weight_decay):
        return optax.sgd(1.0)

    targets = {"ones": np.ones(54), "index": np.arange(54)}[target].astype(np.float32)
    variables = fit(
        getkey(),
        dataclasses.replace(splits, train_targets=np.tile(targets, (4, 1))),
        members_of([1]),
        network=Network(apply_fn, init_fn),
        optimizer=optax.inject_hyperparams(make_optimizer)(weight_decay=0.0),
        loss_fn=lambda outputs, labels: outputs[0] * labels,
        num_epochs=1,
        batch_size=batch_size,
    )
    np.testing.assert_allclose(variables["params"], [-expected], rtol=1e-6)


def test_two_steps_are_adam_on_the_loss_with_the_penalty(getkey, splits):
    """With the whole table in one batch, as of optax by hand. Biases are 0 before the first."""
    network, decay = regression.one_hidden_layer(8), 0.3
    key = getkey()
    before = fit(jax.random.clone(key), splits, members_of([0]), num_epochs=0)
    after = fit(key, splits, members_of([0], weight_decay=2 * decay), num_epochs=2, batch_size=54)
    params = jax.tree.map(lambda leaf: leaf[0], before["params"])

    def loss(params):
        variables = {**jax.tree.map(lambda leaf: leaf[0], before), "params": params}
        mean, _ = network(variables, jnp.asarray(splits.train_inputs[0]), None)
        squares = sum(jnp.sum(layer["kernel"] ** 2) for layer in params.values())
        return jnp.mean((mean - splits.train_targets[0]) ** 2) + decay * squares

    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
    for one, other in zip(jax.tree.leaves(after["params"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one[0], other, rtol=1e-3, atol=1e-5)


def test_the_penalty_is_twice_the_published_factor():
    assert regression.penalty(0.1, 0.05, 100, 4.0) == pytest.approx(2 * 0.01 * 0.95 / (2 * 100 * 4))


def test_initial_weights_are_uniform_after_glorot(getkey):
    variables = regression.one_hidden_layer(1000).init(getkey(), jnp.zeros((1, 3)))
    kernel = np.asarray(variables["params"]["hidden"]["kernel"])
    limit = np.sqrt(6 / 1003)
    assert np.abs(kernel).max() <= limit
    # 3000 uniform values all lie below 0.99 of the limit with a probability below 1e-13.
    assert np.abs(kernel).max() > 0.99 * limit
    np.testing.assert_array_equal(variables["params"]["hidden"]["bias"], 0)


@pytest.mark.slow
def test_weight_scaling_is_the_network_without_masks(getkey, splits):
    network, members = regression.one_hidden_layer(8), members_of([3, 1], rate=0.5)
    variables = fit(getkey(), splits, members)
    readings = regression.read_deterministic(network, variables, splits, members)
    for member, split in enumerate(members.split):
        one = jax.tree.map(lambda leaf, member=member: leaf[member], variables)
        mean, variance = network(one, jnp.asarray(splits.test_inputs[split]), None)
        np.testing.assert_allclose(readings.mean[member], mean, rtol=1e-5, atol=1e-6)
        expected = stats.norm.logpdf(splits.test_targets[split], mean, np.sqrt(variance))
        np.testing.assert_allclose(readings.log_density[member], expected, rtol=1e-4)
        np.testing.assert_allclose(readings.variance[member], variance, rtol=1e-6)


@pytest.mark.slow
def test_monte_carlo_is_the_mixture_over_the_drawn_masks(getkey, splits):
    network, members = regression.one_hidden_layer(8), members_of([3, 1], rate=0.4)
    variables, key = fit(getkey(), splits, members), getkey()
    readings = regression.read_monte_carlo(
        key, network, variables, splits, members, num_samples=50, progress=no_progress
    )
    with jax.debug_key_reuse(False):
        for member, split in enumerate(members.split):
            one = jax.tree.map(lambda leaf, member=member: leaf[member], variables)
            member_key = jax.random.fold_in(key, member)
            inputs = jnp.asarray(splits.test_inputs[split])
            means = np.stack(
                [network(one, inputs, jax.random.fold_in(member_key, t))[0] for t in range(50)]
            )
            np.testing.assert_allclose(readings.mean[member], means.mean(0), rtol=1e-4, atol=1e-5)
            densities = stats.norm.pdf(splits.test_targets[split], means, np.sqrt(0.5))
            expected = np.log(densities.mean(0))
            np.testing.assert_allclose(readings.log_density[member], expected, rtol=1e-3, atol=1e-4)
            variance = means.var(0) + 0.5
            np.testing.assert_allclose(readings.variance[member], variance, rtol=1e-4)


@pytest.mark.slow
def test_without_dropout_monte_carlo_equals_weight_scaling(getkey, splits):
    network, members = regression.one_hidden_layer(8), members_of([0, 1])
    variables = fit(getkey(), splits, members)
    one = regression.read_deterministic(network, variables, splits, members)
    other = regression.read_monte_carlo(
        getkey(), network, variables, splits, members, num_samples=7, progress=no_progress
    )
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.log_density, other.log_density, rtol=1e-4)


def test_scores_are_in_the_unit_of_the_targets():
    """Against scipy: y = scale * standardised target."""
    mean, targets, scale = np.zeros((1, 3)), np.array([[1.0, 2.0, 2.0]]), np.array([10.0])
    np.testing.assert_allclose(regression.rmse(mean, targets, scale), [10 * np.sqrt(3)])
    log_density = stats.norm.logpdf(targets, 0, 0.5)
    expected = stats.norm.logpdf(10 * targets, 0, 10 * 0.5).mean()
    np.testing.assert_allclose(regression.log_likelihood(log_density, scale), [expected])


def test_pooled_networks_are_those_side_by_side():
    mean = np.array([[1.0], [3.0], [10.0], [20.0]])
    log_density = np.log(np.array([[0.2], [0.4], [0.5], [0.1]]))
    result = regression.pooled(Readings(mean, log_density, np.ones((4, 1))), 2)
    np.testing.assert_allclose(result.mean, [[2.0], [15.0]])
    np.testing.assert_allclose(np.exp(result.log_density), [[0.3], [0.3]])
    np.testing.assert_allclose(result.variance, [[2.0], [26.0]])


def test_heads_predict_a_positive_variance(getkey, splits):
    network = regression.one_hidden_layer(8, predicts_variance=True)
    members = members_of([0, 1])
    variables = fit(getkey(), splits, members, network=network, loss_fn=gaussian_nll, num_epochs=20)
    readings = regression.read_deterministic(network, variables, splits, members)
    assert (readings.variance > 0).all()
    assert np.unique(readings.variance).size == readings.variance.size


@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_a_small_variance_beside_a_large_mean_is_not_lost(splits, spread):
    """Variance 1e-6 and mean 3: their mean square in float32 holds no digit of the variance."""

    def apply_fn(variables, inputs, key):
        sign = 0.0 if key is None else jax.random.rademacher(key, inputs.shape[:1], jnp.float32)
        return 3.0 + spread * sign * jnp.ones(len(inputs)), jnp.full(len(inputs), 1e-6)

    network, members = Network(apply_fn, None), members_of([2])
    variables = {"params": jnp.zeros(1)}
    key, num_samples = jax.random.key(0), 100
    deterministic = regression.read_deterministic(network, variables, splits, members)
    sampled = regression.read_monte_carlo(
        key, network, variables, splits, members, num_samples=num_samples, progress=no_progress
    )
    np.testing.assert_allclose(deterministic.variance, 1e-6, rtol=1e-6)
    with jax.debug_key_reuse(False):
        member_key = jax.random.fold_in(key, 0)
        keys = [jax.random.fold_in(member_key, sample) for sample in range(num_samples)]
        means = np.stack([apply_fn(None, splits.test_inputs[2], key)[0] for key in keys])
    expected = means.astype(np.float64).var(0) + 1e-6
    # The last digit of 3 in float32 is 2.4e-7, and the running mean loses a few of them.
    np.testing.assert_allclose(sampled.variance[0], expected, rtol=5e-3)
    for readings in (deterministic, regression.pooled(sampled, 1)):
        scores = uci_ensembles._score(readings, splits, members.split)
        assert np.isfinite(scores["nll"]).all()


def run_tiny(make_protocol, setting, data_dir, **options):
    protocol = make_protocol((setting,))
    assert protocol.files == ("tiny.txt",)
    return protocol, protocol.run_part("Tiny", Options(data_dir, **options), no_progress)


TINY = {
    "uci-dropout": (
        uci_dropout,
        uci_dropout.Setting(TABLE, 0.05, 0.5, num_units=8, num_epochs=20),
    ),
    "uci-ensembles": (
        uci_ensembles,
        uci_ensembles.Setting(
            TABLE,
            0.05,
            8,
            long=uci_ensembles.Training(20, 32, 1e-3),
            stated=uci_ensembles.Training(4, 20, 0.1),
            short=uci_ensembles.Training(4, 20, 0.01),
        ),
    ),
    "uci-ensemble-of-ten": (
        uci_ensemble_of_ten,
        uci_ensemble_of_ten.Setting(TABLE, (0.3, 0.6), num_units=8, num_epochs=20),
    ),
}


@pytest.fixture
def few_samples(monkeypatch):
    for module in (uci_dropout, uci_ensembles, uci_ensemble_of_ten):
        monkeypatch.setattr(module, "NUM_SAMPLES", 20)
    monkeypatch.setattr(uci_dropout, "NETWORKS_PER_SPLIT", 2)
    monkeypatch.setattr(uci_ensemble_of_ten, "NUM_VALIDATION_SAMPLES", 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_part_has_every_measure_for_every_split(data_dir, few_samples, name):
    module, setting = TINY[name]
    protocol, result = run_tiny(module.make_protocol, setting, data_dir, splits=3, fraction=0.5)
    values = result.values["Tiny"]
    assert set(values) == set(protocol.measures)
    for measure, numbers in values.items():
        assert np.shape(numbers) == (3,), measure
        assert np.isfinite(numbers).all(), measure
    assert (result.epochs, result.paper_epochs) == (10, 20)


@pytest.mark.slow
def test_the_difference_of_readings_is_paired(data_dir, few_samples):
    module, setting = TINY["uci-dropout"]
    values = run_tiny(module.make_protocol, setting, data_dir)[1].values["Tiny"]
    difference = np.subtract(values["weight-scaling"], values["monte-carlo"])
    np.testing.assert_allclose(values["difference"], difference)
    assert np.abs(difference).max() > 0


@pytest.mark.slow
def test_ten_averaged_scores_and_ten_pooled_predictions_differ_as_jensen_says(
    data_dir, few_samples
):
    """A mixture's log-density is at least the members' mean; its mean has at most their RMSE."""
    module, setting = TINY["uci-ensemble-of-ten"]
    values = run_tiny(module.make_protocol, setting, data_dir)[1].values["Tiny"]
    assert (np.subtract(values["pooled-ll"], values["averaged-ll"]) > 0).all()
    assert (np.subtract(values["averaged-rmse"], values["pooled-rmse"]) > 0).all()
    difference = np.subtract(values["pooled-ll"], values["one-ll"])
    np.testing.assert_allclose(values["pooled-difference"], difference)


def test_validation_chooses_the_rate_with_the_largest_log_likelihood(
    data_dir, few_samples, monkeypatch
):
    """With readings that favour one candidate of each split, that one is chosen.

    Another candidate diverged, so that its log-likelihood is NaN.
    """
    module, setting = TINY["uci-ensemble-of-ten"]
    numbers = uci.read_table(TABLE, data_dir)
    validation = uci.validation_splits(numbers, 3, 2)
    best = np.array([5, 2])  # Of 4 rates by 2 precisions, in this order.

    def favour(key, network, variables, splits, members, **_):
        log_density = np.zeros((2, 8, 11))
        log_density[np.arange(2), best] = 1.0
        log_density[:, 1] = np.nan
        zeros = np.zeros((16, 11))
        return Readings(zeros, log_density.reshape(16, 11), zeros)

    monkeypatch.setattr(regression, "read_monte_carlo", favour)
    rates, precisions = module._choose(
        jax.random.key(0), setting, regression.one_hidden_layer(8), validation, 1, no_progress
    )
    np.testing.assert_array_equal(rates, [0.05, 0.01])
    np.testing.assert_array_equal(precisions, [0.6, 0.3])


def test_an_ensemble_of_heads_is_a_normal_distribution_with_the_mixtures_moments(
    data_dir, few_samples
):
    """By the formula of the paper: the variance is the mean of v + m^2, minus the squared mean."""
    splits = uci.load_splits(TABLE, data_dir, 1)
    means, variances = np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]])
    readings = Readings(means, np.zeros((2, 1)), variances)
    only_row = dataclasses.replace(
        splits, test_inputs=splits.test_inputs[:, :1], test_targets=splits.test_targets[:, :1]
    )
    scores = uci_ensembles._score(regression.pooled(readings, 2), only_row, np.array([0]))
    scale = splits.target_scale[0]
    target = splits.test_targets[0, 0] * scale
    expected = -stats.norm.logpdf(target, scale, scale * np.sqrt(3.0))
    np.testing.assert_allclose(scores["nll"], [expected], rtol=1e-5)


@pytest.mark.slow
def test_an_equal_seed_gives_equal_numbers(data_dir, few_samples):
    module, setting = TINY["uci-dropout"]
    one = run_tiny(module.make_protocol, setting, data_dir, splits=2)[1]
    two = run_tiny(module.make_protocol, setting, data_dir, splits=2)[1]
    other = run_tiny(module.make_protocol, setting, data_dir, splits=2, seed=1)[1]
    assert one.values == two.values
    assert one.values != other.values
