"""Labels per token: their losses, padding, folds, groups, and how the report speaks of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdrop
import jdrop.linen
from jdrop.statistics import EnsembleCurve, equivalence_test
from jdrop.study import report, tuning
from jdrop.study.comparison import Experiment
from jdrop.study.data import (
    DataError,
    fingerprint,
    from_arrays,
    groups_of_tokens,
    outputs_of_tokens,
    with_label_noise,
)
from jdrop.study.errors import UserError
from jdrop.study.models import Model, ModelError, check_model
from jdrop.study.parts import BaselinesPart, DataPart, NetworksPart
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings
from jdrop.study.training_losses import example_losses, token_cross_entropy
from jdrop.train import TrainState, train_step

VOCABULARY, LENGTH = 7, 5
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, LENGTH + 1, 50)
IS_TOKEN = np.arange(LENGTH) < LENGTHS[:, None]
IDS = np.where(IS_TOKEN, RNG.integers(1, VOCABULARY, (50, LENGTH)), 0)
# The next token of a walk around the vocabulary, with some noise.
LABELS = np.where(IS_TOKEN, (IDS + RNG.integers(1, 3, IDS.shape)) % VOCABULARY, -1)
TRAIN, TEST = slice(30), slice(30, 50)
TINY = {
    "replicates": 2,
    "ensemble_size": 3,
    "budget": 2,
    "num_samples": 3,
    "epochs": 3,
    "batch_size": 6,
    "learning_rate": 0.05,
    "controls": False,
    "progress": False,
}


class Tagger(nn.Module):
    """Reads each token by itself, so that padding has no way to others."""

    num_classes: int = VOCABULARY

    @nn.compact
    def __call__(self, ids, train):
        x = nn.relu(nn.Embed(VOCABULARY, 8)(ids))
        x = jdrop.linen.Dropout(0.3)(x, deterministic=not train)
        return nn.Dense(self.num_classes)(x)


def compare(labels=LABELS, ids=IDS, **settings):
    arrays = ids[TRAIN], labels[TRAIN], ids[TEST], labels[TEST]
    return jdrop.compare(Tagger(), *arrays, name="walks", **{**TINY, **settings})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with tuning and theory, and the rows that cross-validation scores."""
    scored = []
    average_losses = tuning.average_losses

    def recorded(outputs, labels, left_out):
        scored.append((labels, left_out))
        return average_losses(outputs, labels, left_out)

    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "average_losses", recorded)
        return compare(out=folder), folder, scored


@pytest.fixture(scope="module")
def comparison(finished):
    return finished[0]


def by_hand(labels):
    """(sequence, position, label) of every token, one after another."""
    return [
        (sequence, position, int(label))
        for sequence, row in enumerate(labels)
        for position, label in enumerate(row)
        if label >= 0
    ]


def test_tokens_are_the_positions_with_a_label_in_their_order():
    outputs = RNG.normal(size=(2, 50, LENGTH, 3))
    expected = np.stack([outputs[:, s, p] for s, p, _ in by_hand(LABELS)], 1)
    np.testing.assert_array_equal(outputs_of_tokens(outputs, LABELS), expected)
    assert outputs_of_tokens(outputs, LABELS[:, 0]) is outputs


@pytest.mark.slow
def test_the_loss_of_a_batch_is_the_mean_over_its_tokens():
    logits = jnp.asarray(RNG.normal(size=(50, LENGTH, VOCABULARY)), jnp.float32)
    labels = jnp.asarray(LABELS)
    losses = [-jax.nn.log_softmax(logits[s, p])[y] for s, p, y in by_hand(LABELS)]
    assert float(token_cross_entropy(logits, labels)) == pytest.approx(np.mean(losses), rel=1e-5)
    scores = example_losses(logits, labels)
    assert float(scores["nll"].mean()) == pytest.approx(np.mean(losses), rel=1e-5)
    wrong = [logits[s, p].argmax() != y for s, p, y in by_hand(LABELS)]
    assert float(scores["error"].mean()) == pytest.approx(np.mean(wrong), rel=1e-5)


@pytest.mark.slow
def test_a_batch_without_labels_changes_nothing():
    network = jdrop.linen.as_network(Tagger())
    variables = network.init(jax.random.key(0), IDS)
    state = TrainState.create(network, variables, optax.sgd(0.1), token_cross_entropy)
    trained, loss = train_step(jax.random.key(1), state, (IDS, jnp.full(LABELS.shape, -1)))
    assert float(loss) == 0
    jax.tree.map(np.testing.assert_array_equal, trained.variables, variables)


@pytest.mark.slow
def test_the_nll_is_the_mean_over_the_tokens_of_the_stored_predictions(finished):
    comparison, folder, _ = finished
    run = RunFolder.open(folder)
    data = run.require("data", DataPart)
    tokens = by_hand(LABELS[TEST])
    assert data.test_labels.tolist() == [label for _, _, label in tokens]
    assert data.test_groups.tolist() == [sequence for sequence, _, _ in tokens]
    assert (data.test_size, data.test_sequences, data.train_sequences) == (len(tokens), 20, 30)
    predictions = run.require("plain", NetworksPart).methods["plain"]
    (stored,) = (each.outputs for each in predictions if each.epochs == TINY["epochs"])
    assert stored.shape == (2, 3, len(tokens), VOCABULARY)
    nll = -np.mean([stored[:, :, index, label] for index, (_, _, label) in enumerate(tokens)])
    (plain,) = (method for method in comparison.same_epochs if method.name == "plain")
    assert plain.points[0].scores["nll"].mean == pytest.approx(nll, rel=1e-5)
    perplexity = plain.points[0].scores["perplexity"]
    assert perplexity.mean == pytest.approx(np.exp(nll), rel=1e-5)
    assert perplexity.low < perplexity.mean < perplexity.high
    # The same for every label: the share of its class among the training tokens.
    counts = np.bincount([y for _, _, y in by_hand(LABELS[TRAIN])], minlength=VOCABULARY) + 1
    constant = run.require("baselines", BaselinesPart).baselines[-1].outputs
    expected = np.tile(np.log(counts / counts.sum()), (len(tokens), 1))
    np.testing.assert_allclose(constant, expected, rtol=1e-5)


@pytest.mark.slow
def test_worth_and_tests_take_sequences_as_independent(finished):
    comparison, folder, _ = finished
    run = RunFolder.open(folder)
    tokens = by_hand(LABELS[TEST])
    probs = {}
    for name in ("plain", "dropout"):
        predictions = run.require(name, NetworksPart).methods[name]
        (stored,) = (each.outputs for each in predictions if each.epochs == TINY["epochs"])
        of_labels = [stored[:, :, index, y] for index, (_, _, y) in enumerate(tokens)]
        probs[name] = np.exp(np.stack(of_labels, -1).astype(np.float64))

    def values_of_sequences(losses):
        """By hand what `group_losses` says: the influence of each sequence on the mean."""
        mean = losses.mean(-1, keepdims=True)
        sequences = np.array([sequence for sequence, _, _ in tokens])
        sums = [(losses - mean)[..., sequences == s].sum(-1, keepdims=True) for s in set(sequences)]
        return mean + len(sums) / len(tokens) * np.concatenate(sums, -1)

    def losses(name, size):
        averages = [np.roll(probs[name], -start, 1)[:, :size].mean(1) for start in range(3)]
        if name == "dropout":
            averages = [probs[name][:, index] for index in range(2)]
        return values_of_sequences(np.mean([-np.log(average) for average in averages], 0))

    plain = np.stack([losses("plain", size) for size in (1, 2, 3)], 1)
    dropout = losses("dropout", 1)
    expected = EnsembleCurve(plain).equivalent(dropout)
    test = equivalence_test(dropout - plain[:, -1], comparison.margins["nll"])
    (found,) = (method.points[0] for method in comparison.same_epochs if method.name == "dropout")
    assert found.worth["nll"].value == pytest.approx(expected.value, rel=1e-4)
    assert found.worth["nll"].low == pytest.approx(expected.low, rel=1e-3)
    assert found.against_ensemble["nll"].difference.low == pytest.approx(
        test.difference.low, rel=1e-3
    )


@pytest.mark.slow
def test_cross_validation_leaves_out_whole_sequences(finished):
    sequences = np.array([sequence for sequence, _, _ in by_hand(LABELS[TRAIN])])
    scored = finished[2]
    assert scored
    for labels, left_out in scored:
        assert labels.tolist() == [y for _, _, y in by_hand(LABELS[TRAIN])]
        assert len(left_out) == TINY["replicates"]
        for rows in left_out:
            others = np.setdiff1d(np.arange(len(labels)), rows)
            assert len(rows)
            assert not {*sequences[rows]} & {*sequences[others]}


@pytest.mark.slow
def test_the_report_speaks_of_tokens_sequences_and_perplexity(finished):
    comparison, folder, _ = finished
    count = len(by_hand(LABELS[TRAIN]))
    text = (folder / "report.md").read_text()
    assert f"walks: {count} training tokens in 30 sequences" in text
    answer = " ".join(report.answer(comparison))
    assert f"On walks with {count} training tokens, one dropout network" in answer
    assert "The perplexity per token is" in answer
    cautions = " ".join(report.cautions(comparison))
    assert "An example of this report is a token" in cautions
    assert "lie in 20 groups by sequence" in cautions
    assert "the intervals are too narrow without groups" in cautions
    assert "perplexity" in text
    assert comparison.data["num_groups"] == 20


@pytest.mark.slow
def test_overfitting_is_scored_on_the_tokens_of_the_chosen_sequences(finished):
    comparison, folder, _ = finished
    sizes = {result.train_size for result in comparison.overfitting}
    assert max(sizes) == len(by_hand(LABELS[TRAIN]))
    assert len(sizes) > 1
    # At the same epochs the curves and the predictions are of the same networks.
    run = RunFolder.open(folder)
    part = run.require("plain", NetworksPart)
    labels = [y for _, _, y in by_hand(LABELS[TRAIN])]
    outputs = part.train_outputs
    nll = -np.mean([outputs[:, 0, index, label] for index, label in enumerate(labels)])
    curve = comparison.learning_curves["plain"]
    recorded = curve.train["nll"][curve.epochs.index(TINY["epochs"])]
    assert recorded == pytest.approx(nll, rel=1e-4)


@pytest.mark.slow
def test_padding_changes_neither_training_nor_scores():
    other_ids = np.where(IS_TOKEN, IDS, RNG.integers(0, VOCABULARY, IDS.shape))
    other_labels = np.where(IS_TOKEN, LABELS, -100)
    same = from_arrays("x", IDS[TRAIN], LABELS[TRAIN], IDS[TEST], LABELS[TEST])
    marked = from_arrays("x", IDS[TRAIN], other_labels[TRAIN], IDS[TEST], other_labels[TEST])
    assert fingerprint(marked) == fingerprint(same)
    quick = {"tune": False, "theory": False}
    first, second = compare(**quick), compare(other_labels, other_ids, **quick)
    for method, other in zip(first.methods, second.methods, strict=True):
        for point, other_point in zip(method.points, other.points, strict=True):
            scores, others = (
                {name: interval.mean for name, interval in each.over_seeds.items()}
                for each in (point, other_point)
            )
            assert others == pytest.approx(scores, rel=1e-5)


def test_groups_of_sequences_hold_their_tokens():
    groups = np.array([f"author {index % 4}" for index in range(20)])
    arrays = IDS[TRAIN], LABELS[TRAIN], IDS[TEST], LABELS[TEST]
    data = from_arrays("x", *arrays, test_groups=groups)
    name, of_tokens, labels = groups_of_tokens(data)
    assert name == "group"
    assert [labels[g] for g in of_tokens] == [groups[s] for s, _, _ in by_hand(LABELS[TEST])]


@pytest.mark.slow
def test_classes_without_a_label_are_those_of_the_model():
    """A vocabulary has rare words; each class of the model has a place."""
    data = from_arrays("x", IDS[TRAIN], LABELS[TRAIN], IDS[TEST], LABELS[TEST])
    assert check_model(Model(Tagger(VOCABULARY + 5)), data) == VOCABULARY + 5
    with pytest.raises(ModelError, match=r"at least 7 classes.* got \(16, 5, 6\)"):
        check_model(Model(Tagger(VOCABULARY - 1)), data)


def test_one_hot_labels_are_told_by_the_model():
    class Classifier(Tagger):
        @nn.compact
        def __call__(self, ids, train):
            return super().__call__(ids, train).mean(1)

    one_hot = np.eye(VOCABULARY, dtype=int)[IDS[:, 0]]
    data = from_arrays("x", IDS[TRAIN], one_hot[TRAIN], IDS[TEST], one_hot[TEST])
    with pytest.raises(ModelError, match=r"one-hot, turn them into .* `labels.argmax\(-1\)`"):
        check_model(Model(Classifier()), data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": LABELS[TRAIN] * 0 - 1}, "labels must hold a class from 0 for at least one"),
        ({"labels": LABELS[TRAIN] * 1.0}, "labels must hold one number for each of the 30 inputs"),
        ({"labels": LABELS[TRAIN][:, :1]}, "or one integer for each of their tokens"),
        ({"test_labels": LABELS[TEST][:, 0]}, "both be of examples or both of tokens"),
        (
            {"test_labels": np.where(np.arange(20) == 3, LABELS[TEST].T, -1).T},
            "test_labels must have labels in at least 2 examples",
        ),
        ({"ood_inputs": IDS[TEST]}, "ood_inputs are for one label per example"),
    ],
)
def test_labels_per_token_that_do_not_fit_are_refused(changes, message):
    arrays = {
        "inputs": IDS[TRAIN],
        "labels": LABELS[TRAIN],
        "test_inputs": IDS[TEST],
        "test_labels": LABELS[TEST],
    }
    with pytest.raises(DataError, match=message):
        from_arrays("x", **{**arrays, **changes})


def test_labels_of_tokens_are_not_made_wrong():
    data = from_arrays("x", IDS[TRAIN], LABELS[TRAIN], IDS[TEST], LABELS[TEST])
    with pytest.raises(DataError, match="labels are per token"):
        with_label_noise(data, 0.1, 0)
    with pytest.raises(UserError, match=r"label_noise .* one label per example"):
        compare(sweep={"label_noise": [0.1]})


def test_predictions_that_the_memory_cannot_hold_are_refused(tmp_path):
    data = from_arrays("x", IDS[TRAIN], LABELS[TRAIN], IDS[TEST], LABELS[TEST])
    settings = Settings(num_samples=10**9)
    with pytest.raises(UserError, match=r"take .* GB.*1000000000 masks .* lower num_samples"):
        Experiment(
            settings,
            Model(Tagger()),
            data,
            folder=tmp_path,
            model_name="tagger",
            margins=None,
            sweep=None,
            command="",
        )
