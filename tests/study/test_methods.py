"""The table of methods: an entry is all that a method needs, and keys are those of old numbers."""

import dataclasses

import jax
import numpy as np
import pytest

from jdrop.study import methods
from jdrop.study.data import Dataset
from jdrop.study.evaluation import evaluate
from jdrop.study.methods import (
    METHODS,
    LeftOutError,
    Method,
    NetworkGroup,
    adam,
    network_groups,
    separate_masks,
)
from jdrop.study.models import FIXED_MASKS, MLP, Model
from jdrop.study.parts import NetworksPart
from jdrop.study.report.figures.style import style_of
from jdrop.study.run_folder import RunError, RunFolder
from jdrop.study.runner import run_parts
from jdrop.study.settings import Settings
from jdrop.study.training import NetworkSpec

X = jax.random.normal(jax.random.key(0), (12, 5))
MODEL = Model(lambda rate=0.5, width_factor=1.0: MLP((10,), 3, rate, 0.0, width_factor))


def test_key_indices_are_those_of_recorded_numbers():
    assert {group.name: group.key_index for group in network_groups()} == {
        "plain": 0,
        "dropout": 1,
        "small": 2,
        "wide": 3,
        "long": 4,
        "regularised": 5,
        "fixed-masks": 6,
        "masksembles": 7,
        "dropout-thinned": 11,
    }
    names = ("EXACT", "OVERFITTING", "SWEEP", "TUNING")
    indices = [getattr(methods, f"{name}_KEY_INDEX") for name in names]
    assert indices == [8, 9, 10, 12]
    # Equal indices would train different networks with the same keys.
    all_indices = [*indices, *(group.key_index for group in network_groups())]
    assert len(all_indices) == len({*all_indices})


def test_groups_have_names_of_their_own_in_the_run_folder():
    groups = {id(method.group): method.group for method in METHODS.values()}
    names = [group.name for group in groups.values()]
    assert len(names) == len({*names})
    assert not {*names} & {"data", "overfitting", "exact", "sweep", "summary"}


def test_methods_of_the_same_networks_share_their_training():
    assert METHODS["dropout"].group is METHODS["monte-carlo"].group
    assert METHODS["weight-scaling"].group is METHODS["monte-carlo"].group
    assert METHODS["early-stopping"].group is METHODS["weight-decay"].group


def test_methods_are_told_apart_by_label_and_style():
    for attributes in (("name",), ("label",), ("color", "marker")):
        values = [tuple(getattr(m, name) for name in attributes) for m in METHODS.values()]
        assert len(values) == len({*values})


@pytest.mark.slow
def test_the_spec_of_every_group_follows_the_settings():
    settings = Settings(ensemble_size=7, budget=3, epochs=4)
    specs = {group.name: group.make_spec(settings, MODEL, X[:1]) for group in network_groups()}
    assert {name: (spec.members, spec.epochs) for name, spec in specs.items()} == {
        "plain": (7, 4),
        "dropout": (3, 4),
        "dropout-thinned": (1, 4),
        "small": (3, 4),
        "wide": (1, 4),
        "long": (1, 12),
        "regularised": (4, 4),
        "fixed-masks": (3, 4),
        "masksembles": (1, 4),
    }
    assert {name for name, spec in specs.items() if spec.record} == {"plain", "dropout"}
    assert {name for name, spec in specs.items() if spec.weight_decays} == {"regularised"}


@pytest.mark.parametrize("name", ["small", "wide"])
def test_small_and_wide_networks_are_left_out_of_a_model_of_one_width(name):
    with pytest.raises(LeftOutError, match=r"Small and wide networks .*width_factor"):
        METHODS[name].group.make_spec(Settings(), Model(MLP((10,), 3)), X[:1])


def test_small_networks_are_left_out_if_no_width_is_small_enough():
    with pytest.raises(LeftOutError, match="Small networks were left out: no width has as few"):
        METHODS["small"].group.make_spec(Settings(budget=100), MODEL, X[:1])


def test_separate_masks_are_ordered_by_mask_and_then_by_replicate():
    variables = {FIXED_MASKS: {"d": np.arange(6).reshape(2, 3, 1)}, "params": np.arange(2)}
    single = separate_masks(variables, 2)
    np.testing.assert_array_equal(single[FIXED_MASKS]["d"][:, 0], [0, 3, 1, 4, 2, 5])
    np.testing.assert_array_equal(single["params"], [0, 1, 0, 1, 0, 1])


def test_a_method_predicts_with_the_networks_of_its_weight_decay():
    variables = {"params": np.arange(8)}  # Two replicates: two networks of each decay.
    method = METHODS["weight-decay"]
    np.testing.assert_array_equal(method.members_with(1.0, variables, 2)["params"], [4, 5])
    np.testing.assert_array_equal(
        METHODS["monte-carlo"].members_with(None, variables, 2)["params"], [0, 1]
    )
    np.testing.assert_array_equal(
        METHODS["plain"].members_with(None, variables, 2)["params"], np.arange(8)
    )


def toy_spec(settings, model, inputs):
    return NetworkSpec(model.plain, 2, settings.epochs, adam(0.1))


TOY = Method(
    name="toy",
    label="{n} toys",
    explanation="A toy that costs {budget}.",
    group=NetworkGroup("toy", 99, toy_spec, is_control=False),
    color="#123456",
    marker="d",
)


@pytest.mark.slow
def test_an_entry_is_all_that_a_new_method_needs(tmp_path, monkeypatch):
    """The method is trained, stored, scored and drawn; without its predictions it is named."""
    monkeypatch.setitem(METHODS, "toy", TOY)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 5)).astype(np.float32)
    labels = np.argmax(inputs[:, :3], 1).astype(np.int32)
    data = Dataset("noise", inputs[:40], labels[:40], inputs[40:], labels[40:], 3)
    settings = Settings(
        replicates=2, ensemble_size=2, budget=2, num_samples=2, epochs=1, batch_size=20,
        tune=False, controls=False, theory=False,
    )  # fmt: skip
    run_folder = RunFolder(tmp_path, dataclasses.asdict(settings))
    progress = []
    run_parts(
        run_folder, settings, MODEL, data, sweep={}, command="test",
        progress=lambda *call: progress.append(call),
    )  # fmt: skip
    assert ("training toy networks", 1, 1) in progress
    comparison = evaluate(run_folder)
    assert [method.name for method in comparison.methods] == [
        "plain", "dropout", "monte-carlo", "weight-scaling", "dropout-thinned", "toy",
        "logistic-regression", "constant",
    ]  # fmt: skip
    toy = comparison.method("toy")
    assert (toy.label, toy.unit, toy.table) == ("{n} toys", "networks", [2])
    assert [point.size for point in toy.points] == [1, 2]
    assert toy.points[1].worth["nll"].largest == 2
    assert style_of("toy") == ("#123456", "d")
    assert "Methods of equal budget were not asked for." in comparison.left_out

    part = run_folder.require("toy", NetworksPart)
    run_folder.store("toy", dataclasses.replace(part, methods={}))
    with pytest.raises(RunError, match="holds the networks of 'toy' but not its predictions"):
        evaluate(run_folder)
