"""The protocol of exact averages over masks: against a loop; its tasks and its measures."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdrop.study.data import Dataset, no_progress
from jdrop.study.models import MLP, Model
from jdrop.study.reproduce import warde_farley
from jdrop.study.reproduce.protocol import Options


@pytest.fixture
def small(monkeypatch):
    """Networks and tasks that take no time."""
    monkeypatch.setattr(warde_farley, "SMALL_UNITS", (3, 2))
    monkeypatch.setattr(warde_farley, "LARGE_UNITS", (6,))
    monkeypatch.setattr(warde_farley, "UNTIED_SIZES", (1, 2))
    monkeypatch.setattr(warde_farley, "NUM_TOY_EXAMPLES", 20)
    monkeypatch.setattr(warde_farley, "MAX_TEST_EXAMPLES", 8)


def examples(num_classes, num_train=20, num_test=8):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(num_train + num_test, 4)).astype(np.float32)
    labels = np.resize(np.arange(num_classes, dtype=np.int32), len(inputs))
    return warde_farley.Examples(
        inputs[:num_train], labels[:num_train], inputs[num_train:], labels[num_train:]
    )


def test_both_averages_are_those_of_a_loop_over_all_masks(getkey, small):
    """Numpy multiplies the units of each of the 32 thinned networks by two, as training does."""
    network = Model(lambda: MLP((3, 2), 2, 0.5)).dropout
    inputs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    variables = network.init(getkey(), jnp.asarray(inputs))
    # Larger weights, so that the averages differ clearly.
    variables = jax.tree.map(lambda leaf: 3 * leaf + 0.1, variables)
    layers = [variables["params"][f"Dense_{layer}"] for layer in range(3)]
    layers = [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for layer in layers]
    log_probs = []
    for kept in product((0, 1), repeat=5):
        x = inputs
        for (kernel, bias), mask in zip(layers, (kept[:3], kept[3:]), strict=False):
            x = 2 * np.array(mask) * np.maximum(x @ kernel + bias, 0)
        logits = x @ layers[2][0] + layers[2][1]
        log_probs.append(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    arithmetic = np.log(np.mean(np.exp(log_probs), 0))
    geometric = np.mean(log_probs, 0)
    geometric -= np.log(np.exp(geometric).sum(1, keepdims=True))
    averages = warde_farley.average_all_masks(network, variables, jnp.asarray(inputs))
    np.testing.assert_allclose(averages.arithmetic, arithmetic, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(averages.geometric, geometric, rtol=1e-4, atol=1e-5)
    assert np.abs(arithmetic - geometric).max() > 0.01


def test_the_small_networks_have_a_value_for_each_seed(getkey, small):
    values = warde_farley.compare_exact(getkey(), examples(2), 2, 1, no_progress)
    assert set(values) == {
        "weight-scaling",
        "geometric",
        "arithmetic",
        "scaling-difference",
        "scaling-nll-difference",
        "pool-difference",
        "pool-nll-difference",
    }
    assert np.isfinite([numbers for numbers in values.values()]).all()
    for difference, reading in (("scaling", "weight-scaling"), ("pool", "arithmetic")):
        expected = np.subtract(values[reading], values["geometric"])
        np.testing.assert_allclose(values[f"{difference}-difference"], expected)
    # Percent of eight examples.
    assert set(values["geometric"]) <= set(np.arange(9) * 12.5)


def test_fewer_seeds_change_no_dropout_network_and_no_ensemble(getkey, small):
    key = getkey()
    one = warde_farley.compare_untied(jax.random.clone(key), examples(10), 1, 1, no_progress)
    two = warde_farley.compare_untied(key, examples(10), 2, 1, no_progress)
    assert set(two) == {
        "dropout",
        "untied-1",
        "untied-2",
        "untied-difference",
        "untied-nll-difference",
    }
    for name, numbers in two.items():
        np.testing.assert_allclose(numbers[:1], one[name], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        two["untied-difference"], np.subtract(two["untied-2"], two["dropout"])
    )
    # Other networks, so that the NLLs differ.
    assert two["untied-nll-difference"][0] != two["untied-nll-difference"][1]


def test_settings_lie_in_their_ranges_and_more_networks_keep_the_first(getkey):
    key = getkey()
    many = warde_farley.draw_settings(jax.random.clone(key), 50)
    few = warde_farley.draw_settings(key, 3)
    ranges = (warde_farley.LEARNING_RATES, warde_farley.WEIGHT_DECAYS)
    for values, first, (low, high) in zip(many, few, ranges, strict=True):
        np.testing.assert_allclose(values[:3], first, rtol=1e-6)
        assert (low <= values).all()
        assert (values <= high).all()
        # All 50 lie in one half of the range with a probability of 2^-49.
        assert values.min() < np.sqrt(low * high) < values.max()


def test_a_pair_of_digits_keeps_both_and_spaces_its_test_examples(small):
    """Ten test examples of each digit, sorted by digit; the only input is the row."""
    labels = np.arange(10, dtype=np.int32)
    digits = Dataset(
        name="digits",
        train_inputs=100 * labels[:, None].astype(np.float32),
        train_labels=labels,
        test_inputs=np.arange(100, dtype=np.float32)[:, None],
        test_labels=np.repeat(labels, 10),
        num_classes=10,
    )
    pair = warde_farley.pair_of_digits(digits, (2, 3))
    np.testing.assert_array_equal(pair.train_inputs[:, 0], [200, 300])
    np.testing.assert_array_equal(pair.train_labels, [0, 1])
    assert pair.test_inputs[0, 0] == 20
    assert pair.test_inputs[-1, 0] == 39
    np.testing.assert_array_equal(pair.test_labels, [0, 0, 0, 0, 1, 1, 1, 1])


def test_the_toy_problem_needs_both_inputs():
    toy = warde_farley.toy_problem(2000, 10)
    assert len(toy.test_labels) == 10
    # Labels are 1 for half the examples, and one input tells nothing: six standard deviations.
    bound = 6 * 0.5 / np.sqrt(2000)
    assert abs(toy.train_labels.mean() - 0.5) < bound
    positive = toy.train_inputs[:, 0] > 0
    assert abs((toy.train_labels == positive).mean() - 0.5) < bound
    assert (toy.train_labels == (toy.train_inputs.prod(1) > 0)).mean() > 0.7


def test_options_choose_seeds_and_epochs(tmp_path, small):
    protocol = warde_farley.make_protocol()
    options = Options(tmp_path, splits=2, fraction=0.05)
    result = protocol.run_part("toy", options, no_progress)
    assert (result.epochs, result.paper_epochs) == (2, 30)
    assert {len(values) for values in result.values["toy"].values()} == {2}
    assert set(result.values["toy"]) <= set(protocol.measures)
