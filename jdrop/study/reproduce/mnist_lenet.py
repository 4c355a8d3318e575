"""Ten LeNet-5 networks, one by one and averaged: the baselines of Nado et al. 2021."""

from functools import partial

import flax.linen as nn
import jax
import optax
from jax import Array

import jdrop.linen
from jdrop.statistics import EnsembleEquivalent
from jdrop.study.data import Progress, images
from jdrop.study.models import Model
from jdrop.study.reproduce import classification, published
from jdrop.study.reproduce.protocol import Measure, Options, PartResult, Protocol

DATASETS = {"MNIST": "mnist", "Fashion-MNIST": "fashion-mnist"}
TRAIN_SIZE = 50_000
NUM_NETWORKS = 10
NUM_EPOCHS = 25
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
RATE = 0.5
NUM_SAMPLES = 100
GLOROT = nn.initializers.glorot_uniform()


class LeNet5(nn.Module):
    """Two convolutions with pooling, a third that sees all that remains, and two dense layers.

    The third convolution gives 120 units. Dropout follows these, and the 84 of the first dense
    layer.
    """

    rate: float = RATE

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Logits `[batch, 10]` from images `[batch, 784]`."""
        convolution = partial(nn.Conv, kernel_size=(5, 5), kernel_init=GLOROT)
        pool = partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(len(x), *images.IMAGE_SHAPE, 1)
        x = pool(nn.relu(convolution(6, padding="SAME")(x)))
        x = pool(nn.relu(convolution(16, padding="VALID")(x)))
        x = nn.relu(convolution(120, padding="VALID")(x)).reshape(len(x), -1)
        x = jdrop.linen.Dropout(self.rate)(x, deterministic=deterministic)
        x = nn.relu(nn.Dense(84, kernel_init=GLOROT)(x))
        x = jdrop.linen.Dropout(self.rate)(x, deterministic=deterministic)
        return nn.Dense(10, kernel_init=GLOROT)(x)


def make_protocol() -> Protocol:
    """The protocol, on the digits and on the clothes."""
    return Protocol(
        name="mnist-lenet",
        title="Ten LeNet-5 networks, and one with dropout",
        paper="Nado et al. 2021, Uncertainty Baselines",
        url="https://arxiv.org/abs/2106.04015",
        summary=(
            f"{NUM_NETWORKS} LeNet-5 networks train without dropout on {TRAIN_SIZE:,} images for "
            f"{NUM_EPOCHS} epochs in batches of {BATCH_SIZE}, with Adam and the learning rate "
            f"{LEARNING_RATE:g}. The average is of their probabilities.",
            f"As many networks train with dropout at {RATE:g} on the 120 units before the first "
            "dense layer and the 84 after it. The baselines lack these. Each is read by weight "
            f"scaling and by {NUM_SAMPLES} masks.",
            "The interval of one network is over the networks. That of the average of all is the "
            "jackknife's: the networks are left out one by one. Both cover the choice of networks. "
            "Their choice of test examples is the paper's, and adds nothing. The jackknife's "
            "interval of an accuracy tends to be too wide, so such a number agrees easily.",
            "The worth is the number of plain networks whose average scores like one dropout "
            "network. Averages of fewer than all networks are over all subsets. Its interval is "
            "over networks and test examples.",
            "With fewer seeds, all trained networks are averaged, and the published "
            "average of ten stands beside none of our numbers.",
        ),
        leaves_open=(
            "The table states 60K parameters; the network here has 61,706, since its last two "
            "convolutions have no padding. The code that stands beside the table pads all "
            "convolutions, which gives 545,546 parameters and about eight times the operations. "
            "Whether the published numbers are of that larger network is not known.",
            "The numbers of one network have no spread, and may be of a single one.",
            "The code keeps the last, smaller batch of an epoch, which makes 4,900 steps. Here "
            f"an epoch leaves it out: {NUM_EPOCHS * (TRAIN_SIZE // BATCH_SIZE):,} steps. The "
            "setting of the code is 5,000.",
            "The code takes 50,000 images of the 60,000. Here these have the shares of classes of "
            "the whole. No image is held out to stop early.",
            "Initial weights are those of Keras, uniform after Glorot. The epsilon of Adam is "
            "Keras' 1e-7, which optax adds after the correction of the bias.",
            "The dropout networks share all settings with the plain ones. Nothing was tuned for "
            "either.",
        ),
        replicate="seed",
        spread="standard deviation",
        measures=_measures(),
        published=published.MNIST_LENET,
        parts=tuple(DATASETS),
        files=tuple(f"{name}/{file}.gz" for name in DATASETS.values() for file in images.FILES),
        run_part=_run_part,
    )


def _measures() -> dict[str, Measure]:
    measures: dict[str, Measure] = {}
    for score, title, unit in (
        ("nll", "NLL", "in nats"),
        ("accuracy", "accuracy", "in percent of the test examples"),
    ):
        measures |= {
            f"one-{score}": Measure(f"{title} one", f"The mean over plain networks; {unit}."),
            f"ten-{score}": Measure(
                f"{title} of ten", f"The averaged probabilities of {NUM_NETWORKS}; {unit}."
            ),
            f"fewer-{score}": Measure(
                f"{title} of fewer", f"The averaged probabilities of fewer networks; {unit}."
            ),
            f"scaling-{score}": Measure(
                f"{title} dropout WS", f"One dropout network, by weight scaling; {unit}."
            ),
            f"scaling-worth-{score}": Measure(
                f"{title} worth WS", "So many plain networks score like the row above."
            ),
            f"masks-{score}": Measure(
                f"{title} dropout MC", f"One dropout network, by {NUM_SAMPLES} masks; {unit}."
            ),
            f"masks-worth-{score}": Measure(
                f"{title} worth MC", "So many plain networks score like the row above."
            ),
        }
    return measures


def _run_part(part: str, options: Options, progress: Progress) -> PartResult:
    data = images.load(
        DATASETS[part], train_size=TRAIN_SIZE, label_noise=0.0, seed=0, data_dir=options.data_dir
    )
    num_epochs = options.epochs(NUM_EPOCHS)
    training = classification.Training(
        optimizer=optax.adam(LEARNING_RATE, eps=1e-7),
        num_networks=options.count(NUM_NETWORKS),
        num_epochs=num_epochs,
        batch_size=BATCH_SIZE,
        num_samples=NUM_SAMPLES,
        batching="scan",  # Convolutions of several networks at once are slow on a CPU.
    )
    key = jax.random.fold_in(jax.random.key(options.seed), list(DATASETS).index(part))
    scores = classification.compare(key, Model(LeNet5), data, training, progress)
    values, worth = as_table(scores)
    return PartResult({part: values}, num_epochs, NUM_EPOCHS, seconds=0.0, worth={part: worth})


def as_table(
    scores: classification.Scores,
) -> tuple[dict[str, list[float]], dict[str, EnsembleEquivalent]]:
    """The values and the worths by measure: the accuracy instead of the error."""
    values = {}
    for name, numbers in scores.values.items():
        method, score = name.split("-")
        if method == "average":
            method = "ten" if len(numbers) == NUM_NETWORKS else "fewer"
        if score == "error":
            values[f"{method}-accuracy"] = [100 - error for error in numbers]
        else:
            values[f"{method}-nll"] = numbers
    worth = {}
    for name, equivalent in scores.worth.items():
        method, score = name.split("-")
        worth[f"{method}-worth-{'accuracy' if score == 'error' else score}"] = equivalent
    return values, worth
