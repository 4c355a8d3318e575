"""The folder of a run: whole files, one run in each, parts and states that come back."""

import json
import os

import jax
import numpy as np
import pytest

from jdrop.study import run_folder as run_folder_module
from jdrop.study.analyses import CoAdaptation, LearningCurve
from jdrop.study.evaluation import evaluate
from jdrop.study.parts import (
    DataPart,
    MethodPredictions,
    NetworksPart,
    SummaryPart,
    SweepCell,
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
    "sweep-0": SweepCell({"rate": 0.2, "train_size": 100}, OUTPUTS, OUTPUTS + 1),
    "summary": SummaryPart("jdrop", ["Nothing."], {"jax": "1"}, {"this run": 2.0}, ["plain"]),
}


def assert_equal_parts(part, other):
    leaves = jax.tree.map(lambda value: value, (vars(part), vars(other)))
    assert repr(leaves[0]) == repr(leaves[1])
    assert type(part) is type(other)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_comes_back_as_it_was_stored(tmp_path, name):
    run_folder = RunFolder(tmp_path / "run", RUN_CONFIG)
    assert run_folder.load(name, type(PARTS[name])) is None
    assert not run_folder.is_complete(name)
    run_folder.store(name, PARTS[name])
    again = RunFolder(tmp_path / "run", RUN_CONFIG)
    assert again.is_complete(name)
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


def cut(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def of_another_kind(content):
    return b"[3]"


@pytest.mark.parametrize("damage", [cut, emptied, of_another_kind])
@pytest.mark.parametrize("name", ["plain.npz", "plain.json"])
def test_damaged_files_are_named_and_their_part_is_not_complete(tmp_path, caplog, name, damage):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("plain", PARTS["plain"])
    path = tmp_path / "parts" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"plain.json .*is damaged.* computes the part again"):
        run_folder.load("plain", NetworksPart)
    assert not run_folder.is_complete("plain")
    assert "is computed again now" in caplog.text
    run_folder.store("plain", PARTS["plain"])
    assert_equal_parts(run_folder.load("plain", NetworksPart), PARTS["plain"])


@pytest.mark.parametrize("changed", ["plain.npz", "plain.json"])
def test_a_part_is_hashed_again_only_if_its_files_have_changed(tmp_path, monkeypatch, changed):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("plain", PARTS["plain"])
    hashed = []
    file_hash = run_folder_module._file_hash
    monkeypatch.setattr(
        run_folder_module, "_file_hash", lambda path: hashed.append(path.name) or file_hash(path)
    )
    for _ in range(3):
        assert run_folder.is_complete("plain")
    assert hashed == ["plain.npz"]
    path = tmp_path / "parts" / changed
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    # The clock of a file system may stand still for some milliseconds.
    os.utime(path, (0, 0))
    assert not run_folder.is_complete("plain")
    assert not run_folder.is_complete("plain")


def test_no_flipped_bit_changes_a_part(tmp_path):
    """Each byte of the JSON, and each of the arrays' file, loses one bit in turn."""
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("sweep-0", PARTS["sweep-0"])
    for path in sorted((tmp_path / "parts").iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            try:
                part = run_folder.load("sweep-0", SweepCell)
            except RunError:
                continue
            # White space may change.
            assert path.suffix == ".json"
            assert_equal_parts(part, PARTS["sweep-0"])
        path.write_bytes(content)


def test_a_missing_file_of_arrays_is_found(tmp_path):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("plain", PARTS["plain"])
    (tmp_path / "parts" / "plain.npz").unlink()
    assert not run_folder.is_complete("plain")


@pytest.mark.parametrize("other", [RUN_CONFIG | {"seed": 5}, RUN_CONFIG])
def test_a_part_of_another_run_or_name_is_refused(tmp_path, other):
    RunFolder(tmp_path / "other", other).store("plain", PARTS["plain"])
    run_folder = RunFolder(tmp_path / "run", RUN_CONFIG)
    name = "plain" if other != RUN_CONFIG else "dropout"
    (tmp_path / "run" / "parts").mkdir()
    for suffix in (".json", ".npz"):
        path = tmp_path / "other" / "parts" / f"plain{suffix}"
        path.rename(tmp_path / "run" / "parts" / f"{name}{suffix}")
    with pytest.raises(RunError, match="or of another run"):
        run_folder.load(name, NetworksPart)


def test_a_part_of_another_type_is_refused(tmp_path):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("plain", PARTS["tuning-plain"])
    with pytest.raises(RunError, match="num_networks"):
        run_folder.load("plain", NetworksPart)


def test_a_part_that_cannot_be_read_is_not_answered_by_computing_it_again(tmp_path, monkeypatch):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("plain", PARTS["plain"])

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    for read in (run_folder.is_complete, lambda name: run_folder.load(name, NetworksPart)):
        with pytest.raises(RunError, match=r"Permission denied.; make it readable"):
            read("plain")


def test_a_run_whose_part_was_deleted_is_not_scored_without_it(tmp_path):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    for name in ("data", "summary"):
        run_folder.store(name, PARTS[name])
    with pytest.raises(RunError, match="the part 'plain' is missing"):
        evaluate(run_folder)


def test_a_part_is_complete_only_with_its_json(tmp_path):
    run_folder = RunFolder(tmp_path, RUN_CONFIG)
    run_folder.store("plain", PARTS["plain"])
    (tmp_path / "parts" / "plain.json").unlink()
    assert not run_folder.is_complete("plain")
    assert run_folder.load("plain", NetworksPart) is None


def test_run_json_holds_the_configuration_and_the_format(tmp_path):
    RunFolder(tmp_path, RUN_CONFIG)
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored == RUN_CONFIG | {"hidden": [8, 8], "format": FORMAT}
