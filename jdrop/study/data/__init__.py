"""The data of the comparison: named data sets, and arrays, tables and predictions of the user."""

from jdrop.study.data.arrays import from_arrays
from jdrop.study.data.dataset import (
    DataError,
    Dataset,
    Progress,
    fingerprint,
    generator,
    named_seed,
    no_progress,
    noisy,
    printable,
    shuffled,
    strata,
    stratified,
    subset,
    with_label_noise,
)
from jdrop.study.data.folds import NUM_FOLDS, folds
from jdrop.study.data.images import DATASETS, OOD_DATASETS, load
from jdrop.study.data.predictions import Predictions, load_predictions
from jdrop.study.data.streams import (
    Stream,
    chunks,
    is_too_large,
    join,
    num_examples,
    shapes_of,
    take,
)
from jdrop.study.data.tables import load_table
from jdrop.study.data.tokens import (
    groups_of_tokens,
    labels_of_tokens,
    outputs_of_tokens,
    sequences_of_tokens,
)

__all__ = [
    "DATASETS",
    "NUM_FOLDS",
    "OOD_DATASETS",
    "DataError",
    "Dataset",
    "Predictions",
    "Progress",
    "Stream",
    "chunks",
    "fingerprint",
    "folds",
    "from_arrays",
    "generator",
    "groups_of_tokens",
    "is_too_large",
    "join",
    "labels_of_tokens",
    "load",
    "load_predictions",
    "load_table",
    "named_seed",
    "no_progress",
    "noisy",
    "num_examples",
    "outputs_of_tokens",
    "printable",
    "sequences_of_tokens",
    "shapes_of",
    "shuffled",
    "strata",
    "stratified",
    "subset",
    "take",
    "with_label_noise",
]
