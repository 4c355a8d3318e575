"""Compares real models with ensembles of themselves: how many networks is each worth?

Each study is small, so that two CPU cores finish it in minutes: few images, narrow networks, three
replicates. It says what such a network gains from dropout, not what a large one does.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from real_models_data import (
    PACKAGES,
    Examples,
    characters,
    digits_as_points,
    docstrings,
    fashion_mnist,
)
from real_models_networks import CNN, CharacterModel, DeepSets, ResNet, TextClassifier, ViT

import jdrop


@dataclass(frozen=True)
class Study:
    """A model and its data.

    Attributes:
        data: for the report.
        load: `load(data_dir)` reads the examples.
        make_model: `make_model(examples)` makes the model for `jdrop.compare`.
        settings: of `jdrop.compare` that differ from `SETTINGS`.
    """

    data: str
    load: Callable[[Path | None], Examples]
    make_model: Callable[[Examples], Any]
    settings: dict[str, Any]


SETTINGS = {
    "replicates": 3,
    "ensemble_size": 4,
    "budget": 2,
    "num_samples": 20,
    "batch_size": 50,
    "controls": False,
    "theory": False,
}


def num_tokens(tokens: Any) -> int:
    """The size of the vocabulary of training tokens."""
    return int(tokens.max()) + 1


STUDIES = {
    "cnn": Study(
        "Fashion-MNIST, 1,000 images",
        partial(fashion_mnist, train_size=1000, test_size=1000),
        lambda examples: CNN,
        {"epochs": 10},
    ),
    "resnet": Study(
        "Fashion-MNIST, 1,000 images",
        partial(fashion_mnist, train_size=1000, test_size=1000),
        lambda examples: ResNet,
        {"epochs": 8},
    ),
    "vit": Study(
        "Fashion-MNIST, 1,000 images",
        partial(fashion_mnist, train_size=1000, test_size=1000),
        lambda examples: ViT,
        {"epochs": 20},
    ),
    "text": Study(
        "docstrings of six packages",
        lambda data_dir: docstrings(per_package=500),
        lambda examples: partial(
            TextClassifier,
            vocabulary=num_tokens(examples.inputs["tokens"]),
            num_classes=len(PACKAGES),
        ),
        {"epochs": 10},
    ),
    "characters": Study(
        "topics of Python's help()",
        lambda data_dir: characters(per_topic=4),
        lambda examples: partial(CharacterModel, vocabulary=num_tokens(examples.labels)),
        {"epochs": 20, "batch_size": 20, "num_samples": 10},
    ),
    "sets": Study(
        "digits as sets of points",
        lambda data_dir: digits_as_points(train_size=500),
        lambda examples: DeepSets,
        {"epochs": 100},
    ),
}


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(list(STUDIES)))
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of Fashion-MNIST's files; by default they are downloaded.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--replicates", type=int, default=SETTINGS["replicates"], show_default=True)
def main(name: str, data_dir: Path | None, out: Path | None, replicates: int) -> None:
    """Runs a study and prints what the dropout network is worth."""
    study = STUDIES[name]
    examples = study.load(data_dir)
    comparison = jdrop.compare(
        study.make_model(examples),
        examples.inputs,
        examples.labels,
        examples.test_inputs,
        examples.test_labels,
        groups=examples.groups,
        test_groups=examples.test_groups,
        name=study.data,
        out=out or Path("comparison") / name,
        **{**SETTINGS, **study.settings, "replicates": replicates},
    )
    print(comparison.method("dropout").points[0].worth["nll"])
    # Of all cores together, and the same if other programs run.
    print(f"{time.process_time() / 60:.1f} minutes of processor time")


if __name__ == "__main__":
    main()
