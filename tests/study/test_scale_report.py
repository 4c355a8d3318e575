"""`scripts/scale_report.py`: what it calls a difference between two reports."""

import copy
import importlib.util
import math
import sys
from pathlib import Path

import click
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

REPORT = {
    "settings": {"epochs": 20},
    "versions": {"jax": "1.2"},
    "seconds": {"this run": 3.0},
    "methods": [
        {
            "label": "dropout",
            "points": [
                {
                    "size": 1,
                    "cost": {"train_flops": 100.0, "train_seconds": 2.0},
                    "scores": {
                        "nll": {"mean": 0.5, "low": 0.4, "high": 0.6, "num_replicates": 2},
                        "error": {"mean": 0.25, "num_replicates": 2},
                    },
                    "worth": {"nll": {"value": 2.0, "low": 1.0, "high": "Infinity"}},
                    "against_ensemble": {
                        "nll": {
                            "difference": {
                                "mean": 0.0,
                                "low": -0.009,
                                "high": 0.009,
                                "num_replicates": 2,
                            },
                            "margin": 0.01,
                            "p_value": 0.04,
                        }
                    },
                }
            ],
        }
    ],
    "mask_curve": {"nll": [0.5, 0.25]},
}


@pytest.fixture(scope="module")
def scale_report():
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("scale_report", SCRIPTS / "scale_report.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["scale_report"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


def changed(change):
    report = copy.deepcopy(REPORT)
    change(report, report["methods"][0]["points"][0])
    return report


def test_equal_reports_differ_in_times_alone(scale_report):
    def change(report, point):
        report["seconds"]["this run"] = 99.0
        report["settings"]["epochs"] = 99
        point["cost"]["train_seconds"] = 99.0

    found = scale_report.differences(REPORT, changed(change))
    assert {kind: each.count for kind, each in found.items()} == {
        "sizes, epochs, FLOPs and bytes": 6,
        "mean scores": 2,
        "ends of intervals": 4,
        "worth, in plain networks": 3,
        "mean differences of scores": 1,
        "p-values of verdicts": 1,
        "mask curve": 2,
    }
    assert all(each.relative == each.absolute == 0 for each in found.values())


def test_the_largest_difference_of_each_kind(scale_report):
    def change(report, point):
        point["scores"]["nll"]["mean"] = 0.4
        point["worth"]["nll"]["high"] = 5.0
        report["mask_curve"]["nll"][1] = 0.125

    found = scale_report.differences(REPORT, changed(change))
    largest = {kind: (each.relative, each.absolute) for kind, each in found.items()}
    assert largest["mean scores"] == pytest.approx((0.2, 0.1))
    assert largest["worth, in plain networks"] == (1.0, math.inf)
    assert largest["mask curve"] == (0.5, 0.125)
    assert largest["mean differences of scores"] == (0.0, 0.0)


def test_a_number_in_one_report_only_is_an_error(scale_report):
    def change(report, point):
        del point["worth"]

    with pytest.raises(click.ClickException, match="3 numbers are in one report only"):
        scale_report.differences(REPORT, changed(change))


def test_the_page_counts_verdicts_that_are_the_same_word(scale_report):
    def change(report, point):
        point["against_ensemble"]["nll"]["difference"]["low"] = -0.02

    other = changed(change)
    assert [*dict(scale_report.verdicts_of(REPORT)).values()] == ["equivalent"]
    assert [*dict(scale_report.verdicts_of(other)).values()] != ["equivalent"]
    text = scale_report.page({"1 x 1": REPORT, "1 x 8": REPORT, "2 x 4": other}, ())
    assert "| verdicts that are the same word | 1 | 1 | 0 |" in text
    assert "| dropout | 0.500000 [0.4000, 0.6000] |" in text
