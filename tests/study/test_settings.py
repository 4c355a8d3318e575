"""Settings are described once, and refuse with a sentence what they cannot be."""

import dataclasses
import json

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jdrop.study.errors import UserError
from jdrop.study.settings import Settings, checked_sweep


@pytest.fixture(autouse=True)
def _without_type_checks(monkeypatch):
    """Users run without the type checker of the tests, which would refuse these values first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_numpy_and_jax_scalars_become_python_numbers():
    settings = Settings(
        replicates=np.int64(2),
        epochs=jnp.int32(3),
        learning_rate=np.float32(0.5),
        controls=np.bool_(False),
    )
    assert settings == Settings(replicates=2, epochs=3, learning_rate=0.5, controls=False)
    assert json.loads(json.dumps(dataclasses.asdict(settings))) == dataclasses.asdict(settings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("replicates", 2.5, "replicates must be an integer of at least 2, got 2.5"),
        ("replicates", 1, "replicates must be an integer of at least 2, got 1"),
        ("ensemble_size", "10", "ensemble_size must be an integer of at least 2, got '10'"),
        ("epochs", True, "epochs must be an integer of at least 1, got True"),
        ("budget", None, "budget must be an integer of at least 2, got None"),
        ("learning_rate", 0, "learning_rate must be a number above 0 and at most 1,000,000, got 0"),
        ("learning_rate", float("nan"), "learning_rate must be a number above 0 and .*, got nan"),
        ("learning_rate", float("inf"), "learning_rate must be a number above 0 and .*, got inf"),
        ("learning_rate", "0.1", "learning_rate must be a number above 0 and .*, got '0.1'"),
        ("learning_rate", 10**400, "learning_rate must be a number above 0 and at most"),
        ("controls", "no", "controls must be True or False, got 'no'"),
        ("theory", 1, "theory must be True or False, got 1"),
        ("seed", -1, "seed must be an integer of at least 0 and at most 4,294,967,295, got -1"),
        ("seed", 2**32, "seed must be an integer .*, got 4294967296"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(name, value, message):
    with pytest.raises(UserError, match=message):
        Settings(**{name: value})


def test_an_unknown_setting_is_refused_with_the_names_of_all():
    with pytest.raises(UserError, match=r"settings must be among replicates, .*, got epoch\."):
        Settings.from_mapping({"epoch": 3})


def test_the_docstring_describes_every_setting():
    for field in dataclasses.fields(Settings):
        description = " ".join(Settings.__doc__.split())
        assert f"{field.name}: {field.metadata['description']}" in description


def test_swept_values_become_python_floats():
    sweep = checked_sweep({"train_size": np.array([20, 40]), "rate": (jnp.float32(0.5), 0)})
    assert json.dumps(sweep) == '{"train_size": [20.0, 40.0], "rate": [0.5, 0.0]}'
    assert checked_sweep(None) == {}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"depth": [1]}, "must name rate or train_size or .*, got 'depth'"),
        ({"rate": 0.1}, "values of rate to sweep must be a list of numbers, got 0.1"),
        ({"rate": "12"}, "values of rate to sweep must be a list of numbers, got '12'"),
        ({"train_size": [20.7]}, r"values of train_size .* a list of integers, got \[20.7\]"),
        ({"rate": []}, r"values of rate to sweep must be different numbers, got \[\]"),
        ({"rate": [0.1, 0.1]}, r"values of rate to sweep must be different numbers, got \[0.1,"),
    ],
)
def test_a_sweep_over_something_else_is_refused(sweep, message):
    with pytest.raises(UserError, match=message):
        checked_sweep(sweep)
