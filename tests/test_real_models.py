"""The studies of `scripts/real_models.py`: their data, and that `compare` accepts their models."""

import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdrop
from jdrop.study.data import from_arrays
from jdrop.study.models import Model, check_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import real_models_data as data
from real_models import STUDIES

pytestmark = pytest.mark.grid


@cache
def examples(name: str) -> data.Examples:
    """Fewer than in the study; images are made up."""
    if name == "text":
        return data.docstrings(per_package=30, vocabulary=50)
    if name == "characters":
        return data.characters(per_topic=2, length=16)
    if name == "sets":
        return data.digits_as_points(train_size=100)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(40, 28, 28, 1)).astype("float32")
    labels = np.arange(40) % 10
    return data.Examples(images[:20], labels[:20], images[20:], labels[20:])


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_the_comparison_accepts_the_model(name):
    e = examples(name)
    given = from_arrays(
        name, e.inputs, e.labels, e.test_inputs, e.test_labels, None, e.groups, e.test_groups
    )
    model = Model(STUDIES[name].make_model(e))
    assert check_model(model, given) == e.labels.max() + 1
    audit = jdrop.audit(model.dropout, jax.tree.map(lambda array: array[:2], given.train_inputs))
    assert audit.faults == ()


@pytest.mark.parametrize("name", ["text", "characters"])
def test_no_text_has_training_and_test_examples(name):
    groups, test_groups = examples(name).groups, examples(name).test_groups
    assert len(groups) == len(examples(name).labels)
    assert set(groups).isdisjoint(test_groups)


def test_docstrings_are_padded_words_without_names_of_packages():
    inputs = examples("text").inputs
    is_word = np.arange(30) < inputs["lengths"][:, None]
    assert ((inputs["tokens"] != data.PADDING) == is_word).all()
    assert inputs["tokens"].max() == 49
    texts = next(data._documents("jax", np.random.default_rng(0)))[1]
    assert texts
    assert not any("jax" in words for words in texts)


def test_labels_of_characters_are_the_characters_that_follow():
    inputs, labels = examples("characters").inputs, examples("characters").labels
    is_there = inputs != data.PADDING
    assert not is_there.all()
    assert ((labels >= 0) == is_there).all()
    assert (labels[:, :-1] == inputs[:, 1:])[is_there[:, 1:]].all()


@pytest.mark.parametrize("padding", [-3.0, 5.0])
def test_points_are_the_dark_pixels_and_padding_does_not_count(padding):
    inputs = examples("sets").inputs
    points, mask = inputs["points"], inputs["mask"]
    assert (points[mask][:, 2] > -1).all()
    assert (points[~mask][:, 2] == -1).all()
    network = Model(STUDIES["sets"].make_model(examples("sets"))).plain
    variables = network.init(jax.random.key(0), inputs)
    changed = {"points": np.where(mask[..., None], points, np.float32(padding)), "mask": mask}
    outputs = [network(variables, x, None) for x in (inputs, changed)]
    assert jnp.array_equal(*outputs)


@pytest.mark.slow
def test_the_head_of_the_transformer_is_zero():
    network = Model(STUDIES["vit"].make_model(examples("vit"))).plain
    images = examples("vit").inputs[:2]
    variables = network.init(jax.random.key(0), images)
    assert not network(variables, images, None).any()


@pytest.mark.slow
def test_the_character_model_sees_no_later_character():
    model = Model(STUDIES["characters"].make_model(examples("characters")))
    tokens = examples("characters").inputs[:2]
    variables = model.plain.init(jax.random.key(0), tokens)
    changed = tokens.copy()
    changed[:, 8:] = 2
    outputs = [model.plain(variables, x, None) for x in (tokens, changed)]
    assert jnp.allclose(outputs[0][:, :8], outputs[1][:, :8], atol=1e-5)
    assert not jnp.allclose(outputs[0][:, 8:], outputs[1][:, 8:])
