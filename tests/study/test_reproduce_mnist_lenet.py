"""LeNet-5 networks, averages of all subsets of them, and what a dropout network is worth."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idx_files import write_images

from jdrop.statistics import mean_interval
from jdrop.study.data import no_progress
from jdrop.study.models import Model
from jdrop.study.reproduce import classification, mnist_lenet, report
from jdrop.study.reproduce.protocol import Options, PartResult, cells
from jdrop.study.reproduce.runner import Reproduction, reproduce

NUM_NETWORKS, NUM_EXAMPLES = 4, 12


def random_log_probs(seed, num_networks=NUM_NETWORKS):
    """Log-probabilities `[network, example, class]` of three classes, and labels."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(num_networks, NUM_EXAMPLES, 3))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return jnp.asarray(log_probs, jnp.float32), np.resize(np.arange(3), NUM_EXAMPLES)


def losses_of(log_probs, labels, members):
    """By score, the losses of averaged probabilities, by numpy alone."""
    probs = np.exp(np.asarray(log_probs, np.float64))[list(members)].mean(0)
    of_labels = probs[np.arange(len(labels)), labels]
    return {"nll": -np.log(of_labels), "error": probs.argmax(-1) != labels}


@pytest.mark.parametrize("score", ["nll", "error"])
def test_the_loss_of_a_size_is_the_mean_over_all_subsets_of_averaged_probabilities(score):
    log_probs, labels = random_log_probs(0)
    values = classification.losses_of_averages(log_probs, labels)[score]
    assert values.shape == (NUM_NETWORKS, NUM_NETWORKS, NUM_EXAMPLES)
    for size in range(1, NUM_NETWORKS + 1):
        subsets = combinations(range(NUM_NETWORKS), size)
        expected = np.mean([losses_of(log_probs, labels, subset)[score] for subset in subsets], 0)
        np.testing.assert_allclose(values[:, size - 1].mean(0), expected, rtol=1e-5, atol=1e-6)
    # Averaged logits would have other losses.
    geometric = np.asarray(jax.nn.log_softmax(log_probs.mean(0)))
    of_logits = -geometric[np.arange(NUM_EXAMPLES), labels]
    if score == "nll":
        assert np.abs(values[:, -1].mean(0) - of_logits).max() > 0.01


@pytest.mark.parametrize("score", ["nll", "error"])
def test_the_values_of_single_networks_are_their_own_losses(score):
    log_probs, labels = random_log_probs(1)
    values = classification.losses_of_averages(log_probs, labels)[score]
    expected = [losses_of(log_probs, labels, [i])[score] for i in range(NUM_NETWORKS)]
    np.testing.assert_allclose(values[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", range(1, NUM_NETWORKS + 1))
def test_the_interval_of_an_average_is_the_jackknifes(size):
    """Its standard error is sqrt((n - 1) / n * sum of squared deviations)."""
    log_probs, labels = random_log_probs(2)
    values = classification.losses_of_averages(log_probs, labels)["nll"][:, size - 1]
    left_out = []
    for index in range(NUM_NETWORKS):
        others = [i for i in range(NUM_NETWORKS) if i != index]
        subsets = combinations(others, min(size, NUM_NETWORKS - 1))
        left_out.append(
            np.mean([losses_of(log_probs, labels, subset)["nll"].mean() for subset in subsets])
        )
    deviations = np.array(left_out) - np.mean(left_out)
    error = np.sqrt((NUM_NETWORKS - 1) / NUM_NETWORKS * (deviations**2).sum())
    interval = mean_interval(values.mean(1).tolist())
    quantile = 3.182446  # Student's, with 3 degrees of freedom.
    np.testing.assert_allclose(interval.high - interval.mean, quantile * error, rtol=1e-4)


def test_a_single_network_is_its_own_average_and_has_no_worth():
    log_probs, labels = random_log_probs(3, num_networks=1)
    scores = classification.score(log_probs, {"scaling": log_probs}, labels)
    assert scores.worth == {}
    assert scores.values["average-nll"] == scores.values["one-nll"]
    assert len(scores.values["average-nll"]) == 1


def test_dropout_networks_that_predict_like_pairs_are_worth_about_two_networks():
    """Each reading averages two of six networks: six of the fifteen pairs."""
    log_probs, labels = random_log_probs(4, num_networks=6)
    neighbours = jnp.roll(log_probs, 1, 0)
    pairs = jnp.logaddexp(log_probs, neighbours) - jnp.log(2)
    scores = classification.score(log_probs, {"scaling": pairs, "masks": log_probs}, labels)
    assert 1.2 < scores.worth["scaling-nll"].value < 4
    assert scores.worth["masks-nll"].value == 1
    errors = [100 * losses_of(log_probs, labels, [i])["error"].mean() for i in range(6)]
    np.testing.assert_allclose(scores.values["masks-error"], errors, rtol=1e-5)


def test_lenet_has_the_stated_parameters_and_drops_before_both_dense_layers(getkey):
    model = Model(mnist_lenet.LeNet5)
    inputs = jnp.zeros((3, 784))
    assert model.num_parameters(inputs) == 61_706
    assert [site.shape for site in model.sites(inputs)] == [(3, 120), (3, 84)]
    variables = model.dropout.init(getkey(), inputs)
    assert model.dropout(variables, inputs, None).shape == (3, 10)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder of few images, and settings for them."""
    monkeypatch.setattr(mnist_lenet, "TRAIN_SIZE", 30)
    monkeypatch.setattr(mnist_lenet, "BATCH_SIZE", 10)
    monkeypatch.setattr(mnist_lenet, "NUM_SAMPLES", 2)
    monkeypatch.setattr(mnist_lenet, "NUM_NETWORKS", 2)
    for name in mnist_lenet.DATASETS.values():
        write_images(tmp_path / name)
    return tmp_path


def test_both_data_sets_are_in_the_table_with_all_measures(small):
    protocol = mnist_lenet.make_protocol()
    saved = []
    options = Options(small, fraction=0.04)
    reproduce(protocol, options, small / "out", saved.append, no_progress)
    reproduction: Reproduction = saved[-1]
    assert set(reproduction.results) == {"MNIST", "Fashion-MNIST"}
    result = reproduction.results["MNIST"]
    assert (result.epochs, result.paper_epochs) == (1, 25)
    values = result.values["MNIST"]
    assert {len(numbers) for numbers in values.values()} == {2}
    fewer = {"fewer-nll", "fewer-accuracy"}
    assert set(values) | set(result.worth["MNIST"]) | fewer == set(protocol.measures)
    # The average of the probabilities has no larger NLL than its networks have on average.
    assert np.mean(values["ten-nll"]) <= np.mean(values["one-nll"]) + 1e-6
    judged = [cell for cell in reproduction.cells if cell.paper is not None]
    assert len(judged) == 8
    table = report.rows(reproduction)
    assert len(table) == len(reproduction.cells) == 24
    assert "1 of 25" in " ".join(report.answer(reproduction))
    # Read from the folder, the results are the same.
    again = reproduce(protocol, options, small / "out", saved.append, no_progress)
    assert report.rows(again) == table
    assert "NaN" not in report.to_json(again, "")


def test_an_average_of_fewer_than_ten_stands_beside_no_published_number():
    protocol = mnist_lenet.make_protocol()

    def judged(num_networks):
        log_probs, labels = random_log_probs(5, num_networks)
        scores = classification.score(log_probs, {"scaling": log_probs}, labels)
        values, worth = mnist_lenet.as_table(scores)
        np.testing.assert_allclose(
            values["one-accuracy"], 100 - np.array(scores.values["one-error"])
        )
        result = PartResult({"MNIST": values}, 1, 25, 0.0, {"MNIST": worth})
        shown = cells(protocol, {"MNIST": result})
        return [cell.measure for cell in shown if cell.paper is not None]

    assert judged(3) == ["one-nll", "one-accuracy"]
    assert judged(10) == ["one-nll", "ten-nll", "one-accuracy", "ten-accuracy"]
