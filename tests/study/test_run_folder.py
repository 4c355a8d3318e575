"""The folder of a run: whole files, one run in each, parts and states that come back."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdrop.study.analyses import CoAdaptation, LearningCurve
from jdrop.study.evaluation import evaluate
from jdrop.study.parts import (
    DataPart,
    MethodPredictions,
    NetworksPart,
    SummaryPart,
    SweepCell,
    SweepPart,
    TuningPart,
)
from jdrop.study.run_folder import FORMAT, RunError, RunFolder

RUN_CONFIG = {"dataset": "digits", "hidden": (8, 8), "seed": 0}

OUTPUTS = np.arange(12, dtype=np.float32).reshape(2, 1, 3, 2)

CO_ADAPTATION = CoAdaptation(
    correlation={},
    zero_share={},
    sparseness={},
    activation_counts={"Dropout_0": [0.5, 0.5]},
    activation_min={"Dropout_0": 0.0},
    activation_max={"Dropout_0": 2.0},
    deleted=[0.0, 1.0],
    deletion={"nll": [0.1, 2.0]},
    features=None,
)

PARTS = {
    "data": DataPart(
        name="digits",
        task="classification",
        train_size=4,
        test_size=3,
        num_classes=2,
        label_noise=0.0,
        target_mean=0.0,
        target_scale=1.0,
        ood_name=None,
        test_labels=np.array([0, 1, 1], np.int32),
        train_labels=np.array([0, 1, 0, 1], np.int32),
    ),
    "plain": NetworksPart(
        num_networks=2,
        num_parameters=10,
        num_bytes=40,
        epoch_flops=1e6,
        epoch_seconds=1.5,
        methods={
            "plain": [MethodPredictions(2, None, OUTPUTS, None, 10.0, 0.1)],
            "monte-carlo": [MethodPredictions(2, 0.1, OUTPUTS + 1, OUTPUTS + 2, 10.0, 0.1)],
        },
        train_outputs=OUTPUTS,
        learning_curve=LearningCurve([1], {"nll": [0.5]}, {"nll": [0.6]}),
        co_adaptation=CO_ADAPTATION,
    ),
    "tuning-plain": TuningPart([1, 2], {"plain": [[[0.5, 0.4], [0.6, 0.5]]]}, 1e6),
    "sweep": SweepPart([SweepCell({"rate": 0.2, "train_size": 100}, OUTPUTS, OUTPUTS + 1)]),
    "summary": SummaryPart("jdrop", ["Nothing."], {"jax": "1"}, {"this run": 2.0}),
}


def assert_equal_parts(part, other):
    leaves = jax.tree.map(lambda value: value, (vars(part), vars(other)))
    assert repr(leaves[0]) == repr(leaves[1])
    assert type(part) is type(other)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_comes_back_as_it_was_stored(tmp_path, name):
    run_folder = RunFolder(tmp_path / "run", RUN_CONFIG)
    assert run_folder.load(name, type(PARTS[name])) is None
    assert not run_folder.has(name)
    run_folder.store(name, PARTS[name])
    again = RunFolder(tmp_path / "run", RUN_CONFIG)
    assert again.has(name)
    assert_equal_parts(again.load(name, type(PARTS[name])), PARTS[name])
    assert_equal_parts(again.require(name, type(PARTS[name])), PARTS[name])
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_arrays_are_stored_under_the_paths_of_their_fields(tmp_path):
    RunFolder(tmp_path, RUN_CONFIG).store("plain", PARTS["plain"])
    with np.load(tmp_path / "parts" / "plain.npz") as arrays:
        np.testing.assert_array_equal(arrays["methods/monte-carlo/0/ood_outputs"], OUTPUTS + 2)
    fields = json.loads((tmp_path / "parts" / "plain.json").read_text())
    assert fields["methods"]["plain"][0]["outputs"] == {
        "array": "methods/plain/0/outputs",
        "shape": [2, 1, 3, 2],
        "dtype": "float32",
    }


def test_a_part_without_arrays_is_json_only(tmp_path):
    RunFolder(tmp_path, RUN_CONFIG).store("summary", PARTS["summary"])
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["summary.json"]


def test_a_folder_of_another_run_is_refused_and_stays_as_it_is(tmp_path):
    RunFolder(tmp_path, RUN_CONFIG)
    with pytest.raises(RunError, match="seed is 0 there and 1 here"):
        RunFolder(tmp_path, RUN_CONFIG | {"seed": 1})
    assert RunFolder.open(tmp_path).run_config["seed"] == 0


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no run\.json"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("stored_format", [None, FORMAT + 1])
def test_a_folder_of_another_format_is_refused(tmp_path, stored_format):
    RunFolder(tmp_path, RUN_CONFIG)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": stored_format}))
    message = f"is of format {stored_format}, this version of jdrop reads format {FORMAT}"
    for open_folder in (RunFolder.open, lambda folder: RunFolder(folder, RUN_CONFIG)):
        with pytest.raises(RunError, match=message):
            open_folder(tmp_path)


def test_parts_without_a_run_config_are_refused(tmp_path):
    RunFolder(tmp_path, RUN_CONFIG).store("plain", PARTS["plain"])
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match=r"holds parts of a run, but no run\.json"):
        RunFolder(tmp_path, {**RUN_CONFIG, "seed": 1})
    assert not (tmp_path / "run.json").exists()


def test_a_damaged_run_config_is_never_answered_by_deleting_it_alone(tmp_path):
    RunFolder(tmp_path, RUN_CONFIG)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="delete the whole folder"):
        RunFolder(tmp_path, RUN_CONFIG)


def test_a_run_without_its_networks_is_scored_as_incomplete(tmp_path):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("data", PARTS["data"])
    with pytest.raises(RunError, match="the part 'summary' is missing"):
        evaluate(run_folder)


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(RunError, match="the part 'plain' is missing"):
        RunFolder(tmp_path, RUN_CONFIG).require("plain", NetworksPart)


@pytest.mark.parametrize("name", ["plain.npz", "plain.json"])
def test_damaged_files_are_named(tmp_path, name):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("plain", PARTS["plain"])
    path = tmp_path / "parts" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RunError, match=f"{name} cannot be read"):
        run_folder.load("plain", NetworksPart)


def without_field(fields):
    del fields["num_parameters"]


def with_text(fields):
    fields["methods"]["plain"][0]["predict_flops"] = "many"


def with_number_for_array(fields):
    fields["methods"]["plain"][0]["outputs"] = 3


def with_labels_for_outputs(fields):
    fields["train_outputs"] = {"array": "labels", "shape": [3], "dtype": "int32"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_field, "the field num_parameters: Field required"),
        (with_text, "the field methods/plain/0/predict_flops: .* valid number"),
        (with_number_for_array, "the field methods/plain/0/outputs: .* must be an array"),
        (with_labels_for_outputs, r"the field train_outputs: .*3 or 4 axes, has shape \(3,\)"),
    ],
)
def test_missing_and_wrong_fields_are_named(tmp_path, damage, message):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("plain", PARTS["plain"])
    path = tmp_path / "parts" / "plain.json"
    fields = json.loads(path.read_text())
    damage(fields)
    path.write_text(json.dumps(fields))
    with np.load(path.with_suffix(".npz")) as arrays:
        np.savez(path.with_suffix(".npz"), **arrays, labels=np.zeros(3, np.int32))
    with pytest.raises(RunError, match=f"plain.json cannot be read .*{message}"):
        run_folder.load("plain", NetworksPart)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "plain.npz cannot be read .it holds no array methods/plain/0/outputs"),
        (
            {"methods/plain/0/outputs": OUTPUTS[:1]},
            re.escape("is float32[1, 1, 3, 2], not float32[2"),
        ),
        ({"methods/plain/0/outputs": OUTPUTS.astype(int)}, re.escape("is int64[2, 1, 3, 2], not")),
    ],
)
def test_missing_and_wrong_arrays_are_named(tmp_path, changed, message):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("plain", PARTS["plain"])
    path = tmp_path / "parts" / "plain.npz"
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files if key != "methods/plain/0/outputs"}
    np.savez(path, **arrays, **changed)
    with pytest.raises(RunError, match=message):
        run_folder.load("plain", NetworksPart)


def test_a_part_is_complete_only_with_its_json(tmp_path):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("plain", PARTS["plain"])
    (tmp_path / "parts" / "plain.json").unlink()
    assert not run_folder.has("plain")
    assert run_folder.load("plain", NetworksPart) is None


def test_the_last_state_of_a_training_comes_back_whole(tmp_path):
    checkpoints = RunFolder(tmp_path, RUN_CONFIG).checkpoints("plain")
    params = {"w": jnp.arange(3.0)}
    state = {"params": params, "opt_state": optax.adam(0.1).init(params)}
    assert checkpoints.restore(state) is None
    for step in (1, 2):
        state = jax.tree.map(lambda leaf: leaf + 1, state)
        checkpoints.save(step, state, {"loss": [0.5, float("inf")], "step": step})
    step, restored, log = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert (step, log) == (2, {"loss": [0.5, float("inf")], "step": 2})
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    checkpoints.delete()
    assert checkpoints.restore(state) is None


def test_run_json_holds_the_configuration_and_the_format(tmp_path):
    RunFolder(tmp_path, RUN_CONFIG)
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored == RUN_CONFIG | {"hidden": [8, 8], "format": FORMAT}
