"""The folder of a run: whole files, one run in each, states that come back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdrop.study.run import Part, Run, RunError

ABOUT = {"dataset": "digits", "hidden": (8, 8), "seed": 0}


def test_a_part_comes_back_as_it_was(tmp_path):
    run = Run(tmp_path / "run", ABOUT)
    assert run.part("plain") is None
    part = Part({"outputs": np.arange(6, dtype=np.float32).reshape(2, 3)}, {"seconds": 1.5})
    run.keep("plain", part)
    found = Run(tmp_path / "run", ABOUT).part("plain")
    assert found is not None
    np.testing.assert_array_equal(found.arrays["outputs"], part.arrays["outputs"])
    assert found.facts == part.facts
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_another_run_is_refused_and_left_alone(tmp_path):
    Run(tmp_path, ABOUT)
    with pytest.raises(RunError, match="seed is 0 there and 1 here"):
        Run(tmp_path, ABOUT | {"seed": 1})
    assert Run.open(tmp_path).about["seed"] == 0


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no run\.json"):
        Run.open(tmp_path)


@pytest.mark.parametrize("name", ["plain.npz", "plain.json"])
def test_damaged_files_are_named(tmp_path, name):
    run = Run(tmp_path, ABOUT)
    run.keep("plain", Part({"outputs": np.zeros(1000)}, {}))
    path = tmp_path / "parts" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RunError, match=f"{name} cannot be read"):
        run.part("plain")


def test_a_part_is_complete_only_with_its_json(tmp_path):
    run = Run(tmp_path, ABOUT)
    run.keep("plain", Part({"outputs": np.zeros(3)}, {}))
    (tmp_path / "parts" / "plain.json").unlink()
    assert run.part("plain") is None


def test_the_last_state_comes_back_whole(tmp_path):
    checkpoints = Run(tmp_path, ABOUT).checkpoints("plain")
    params = {"w": jnp.arange(3.0)}
    state = {"params": params, "opt_state": optax.adam(0.1).init(params)}
    assert checkpoints.restore(state) is None
    for step in (1, 2):
        state = jax.tree.map(lambda leaf: leaf + 1, state)
        checkpoints.save(step, state, {"loss": [0.5, float("inf")], "step": step})
    found = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert found is not None
    step, restored, facts = found
    assert (step, facts) == (2, {"loss": [0.5, float("inf")], "step": 2})
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    checkpoints.delete()
    assert checkpoints.restore(state) is None


def test_what_a_run_is_stands_in_plain_words(tmp_path):
    Run(tmp_path, ABOUT)
    assert json.loads((tmp_path / "run.json").read_text()) == ABOUT | {"hidden": [8, 8]}
