"""Which of our numbers agree with a paper's, by the stated rule, and how a reproduction reads."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jdrop.statistics import EnsembleEquivalent, Interval, mean_interval
from jdrop.study.cli import run_command
from jdrop.study.data import DataError, no_progress
from jdrop.study.errors import RunError
from jdrop.study.reproduce import PROTOCOLS, published, report, runner
from jdrop.study.reproduce.protocol import (
    Measure,
    Options,
    PartResult,
    Protocol,
    Published,
    Statement,
    agreement,
    cells,
    paper_interval,
)


def agrees(text, spread, ours, *, is_difference=False, kind="standard error"):
    paper = Published(text, spread, 20)
    return agreement(paper, ours, paper_interval(paper, kind), is_difference)


@pytest.mark.parametrize(
    ("mean", "expected"), [(5.35, True), (5.354, True), (5.356, False), (5.11, True), (5.10, False)]
)
def test_a_mean_agrees_within_one_spread_after_rounding_to_the_papers_decimals(mean, expected):
    assert agrees("5.23", "0.12", Interval(mean, mean - 1, mean + 1, 20)) is expected


def test_a_spread_that_is_printed_as_zero_leaves_the_rounding():
    assert agrees("0.00", "0.00", Interval(0.0049, 0.004, 0.005, 20))
    assert not agrees("0.00", "0.00", Interval(0.0051, 0.004, 0.006, 20))


@pytest.mark.parametrize(("mean", "expected"), [(1.0, True), (1.29, True), (1.31, False)])
def test_without_a_spread_our_interval_must_hold_what_rounds_to_the_papers_number(mean, expected):
    """Between 1.05 and 1.15 lies what rounds to 1.1."""
    assert agrees("1.1", None, Interval(mean, mean - 0.15, mean + 0.15, 5)) is expected
    assert agrees("1.1", None, Interval(mean, None, None, 1)) is None


@pytest.mark.parametrize(
    ("text", "ours", "expected"),
    [
        ("0.067", Interval(0.05, 0.01, 0.09, 20), True),
        ("0.067", Interval(0.05, -0.01, 0.11, 20), False),
        ("0.067", Interval(-0.05, -0.09, -0.01, 20), False),
        ("-0.067", Interval(-0.5, -0.9, -0.1, 20), True),
        # The published interval is 0.002 ± 0.031, around 0.
        ("0.002", Interval(0.0, -0.1, 0.1, 20), True),
        ("0.002", Interval(0.02, 0.01, 0.03, 20), True),
        ("0.002", Interval(0.05, 0.04, 0.06, 20), False),
    ],
)
def test_a_paired_difference_agrees_if_its_sign_does(text, ours, expected):
    assert agrees(text, "0.015", ours, is_difference=True) is expected


def test_the_interval_of_a_standard_deviation_is_that_of_the_sample_itself():
    values = np.random.default_rng(0).normal(size=20)
    paper = Published(f"{values.mean():.9f}", f"{values.std(ddof=1):.9f}", 20)
    theirs, expected = paper_interval(paper, "standard deviation"), mean_interval(values.tolist())
    np.testing.assert_allclose([theirs.low, theirs.high], [expected.low, expected.high], atol=1e-6)


def test_the_interval_of_a_standard_error_has_students_quantile():
    interval = paper_interval(Published("2", "0.5", 5), "standard error")
    assert interval.high - 2 == pytest.approx(0.5 * stats.t.ppf(0.975, 4))


def test_a_number_without_spread_has_no_interval():
    assert paper_interval(Published("2", None, 5), "standard error").low is None


def made_up(run_part=None, files=()):
    """A protocol of two parts whose numbers are known."""
    measures = {
        "rmse": Measure("RMSE", "The error."),
        "difference": Measure("RMSE a − b", "The difference.", is_difference=True),
        "new": Measure("pooled", "What the paper lacks."),
    }
    results = {
        "Yacht": {"rmse": [1.0, 1.2, 1.1], "difference": [0.1, 0.2, 0.1], "new": [0.5, 0.6, 0.7]},
        "Power": {"rmse": [4.0, 4.2, 4.1], "difference": [0.1, -0.2, 0.1]},
    }

    def known(part, options, progress):
        progress("epochs", 1, 1)
        return PartResult({part: results[part]}, options.epochs(400), 400, seconds=0.0)

    return Protocol(
        name="made-up",
        title="A made-up title",
        paper="Nobody 2026",
        url="https://example.org",
        summary=("A summary.",),
        leaves_open=("Everything.",),
        replicate="split",
        spread="standard error",
        measures=measures,
        published={
            ("Yacht", "rmse"): Published("1.15", "0.10", 20),
            ("Yacht", "difference"): Published("0.12", "0.02", 20),
            ("Power", "rmse"): Published("3.9", "0.1", 20),
        },
        parts=("Yacht", "Power"),
        files=files,
        run_part=run_part or known,
    )


def run(folder, protocol=None, save=lambda reproduction: None, **options):
    options = Options(folder, **options)
    return runner.reproduce(protocol or made_up(), options, folder / "out", save, no_progress)


def test_cells_hold_both_numbers_and_the_verdicts(tmp_path):
    table = {(cell.row, cell.measure): cell for cell in run(tmp_path).cells}
    assert list(table) == [
        ("Yacht", "rmse"),
        ("Yacht", "difference"),
        ("Yacht", "new"),
        ("Power", "rmse"),
        ("Power", "difference"),
    ]
    assert table["Yacht", "rmse"].agrees
    assert table["Yacht", "rmse"].overlaps
    assert table["Yacht", "rmse"].ours.mean == pytest.approx(1.1)
    assert not table["Power", "rmse"].agrees
    assert table["Yacht", "new"].agrees is table["Yacht", "new"].paper is None
    assert table["Power", "difference"].overlaps is None


def test_the_answer_counts_means_and_differences_apart(tmp_path):
    sentences = report.answer(run(tmp_path, splits=3))
    means = "1 of 2 comparisons with published means agree within one standard error: RMSE 1 of 2."
    assert sentences[0] == means
    # Three values around 0.13 do not exclude 0.
    assert sentences[1].startswith(
        "0 of 1 comparisons with published paired differences agree by the rule below the table"
    )
    assert "at most 3 splits" in sentences[2]


def test_a_part_of_the_epochs_is_said(tmp_path):
    reproduction = run(tmp_path, fraction=0.1)
    assert (
        "a part of the paper's epochs: 40 of 400 (Yacht, Power)." in report.answer(reproduction)[-1]
    )


@pytest.mark.parametrize(("fraction", "epochs"), [(1.0, 400), (0.25, 100), (0.0001, 1)])
def test_a_fraction_of_the_epochs_is_at_least_one(tmp_path, fraction, epochs):
    assert Options(tmp_path, fraction=fraction).epochs(400) == epochs


@pytest.mark.parametrize(
    ("sign", "row", "expected"),
    [
        *(("0", "Power", True), ("+", "Power", False), ("0", "Yacht", False), ("+", "Yacht", True)),
        *(("0+", "Power", True), ("0+", "Yacht", True), ("0-", "Yacht", False)),
    ],
)
def test_a_statement_in_words_agrees_by_the_sign_of_our_interval(tmp_path, sign, row, expected):
    values = {"Yacht": [0.1, 0.11, 0.12], "Power": [0.1, -0.1, 0.05]}

    def known(part, options, progress):
        return PartResult({part: {"difference": values[part]}}, 1, 1, seconds=0.0)

    said = {(row, "difference"): Statement("in words", sign)}
    reproduction = run(tmp_path, dataclasses.replace(made_up(known), published=said))
    cell = next(cell for cell in reproduction.cells if cell.row == row)
    assert (cell.agrees, cell.overlaps) == (expected, None)
    assert report.paper_text(cell) == "in words"
    agree = f"{int(expected)} of 1 comparisons with published statements agree by the rule"
    assert report.answer(reproduction)[0].startswith(agree)
    assert report.draw(reproduction) is None
    values = json.loads(report.to_json(reproduction, ""))["cells"]
    assert {"text": "in words", "sign": sign} in [value["paper"] for value in values]


def test_one_value_says_nothing_on_a_statement(tmp_path):
    def known(part, options, progress):
        return PartResult({part: {"difference": [0.1]}}, 1, 1, seconds=0.0)

    said = {("Yacht", "difference"): Statement("in words", "+")}
    reproduction = run(tmp_path, dataclasses.replace(made_up(known), published=said))
    assert reproduction.cells[0].agrees is None


def test_the_files_hold_the_numbers_and_nothing_from_elsewhere(tmp_path):
    reproduction = run(tmp_path)
    report.write(reproduction, "jdrop reproduce made-up", tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "| Yacht | RMSE | 1.15±0.10 | 1.10±0.25 | yes | overlap |" in markdown
    assert "Everything." in markdown
    html = (tmp_path / "report.html").read_text()
    assert "<svg" in html
    assert "jdrop reproduce made-up" in html
    assert "src=" not in html.replace('src=""', "")
    assert "<link" not in html
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["cells"][0]["paper"]["text"] == "1.15"
    assert values["cells"][0]["agrees"] is True
    assert (tmp_path / "agreement.png").stat().st_size > 1000


def test_the_table_in_the_terminal_has_a_row_for_each_cell(tmp_path):
    reproduction = run(tmp_path)
    assert report.terminal(reproduction).row_count == len(reproduction.cells)


def test_a_protocol_without_spreads_has_no_figure(tmp_path):
    protocol = dataclasses.replace(made_up(), published={})
    assert report.draw(run(tmp_path, protocol)) is None


def test_complete_parts_are_not_run_again(tmp_path):
    calls = []

    def stop_at_power(part, options, progress):
        calls.append(part)
        if part == "Power" and calls.count("Power") == 1:
            raise KeyboardInterrupt
        return made_up().run_part(part, options, progress)

    protocol, saved = made_up(stop_at_power), []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, protocol, saved.append)
    assert "Not complete yet: Power." in report.answer(saved[-1])
    assert len(run(tmp_path, protocol).results) == 2
    assert calls == ["Yacht", "Power", "Power"]


def test_a_damaged_part_is_run_again(tmp_path):
    run(tmp_path)
    path = tmp_path / "out" / "parts" / "Yacht.json"
    path.write_text(path.read_text().replace("1.2", "9.9"))
    assert run(tmp_path).cells[0].ours.mean == pytest.approx(1.1)


def test_the_folder_of_other_options_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(RunError, match="seed is 0 there and 1 here"):
        run(tmp_path, seed=1)


def test_other_data_is_refused_too(tmp_path):
    protocol = made_up(files=("table.txt",))
    (tmp_path / "table.txt").write_text("1")
    run(tmp_path, protocol)
    (tmp_path / "table.txt").write_text("2")
    with pytest.raises(RunError, match="data is"):
        run(tmp_path, protocol)


def test_parts_of_other_code_are_refused(tmp_path, monkeypatch):
    run(tmp_path, made_up())
    monkeypatch.setattr(runner, "_program_hash", lambda protocol: "of an edited protocol")
    with pytest.raises(RunError, match="program is"):
        run(tmp_path, made_up())


def test_the_code_of_a_protocol_is_its_module_and_what_that_imports():
    files = runner._program(Path(runner.__file__).with_name("uci_ensembles.py"))
    assert [file.name for file in files] == [
        *("regression.py", "uci.py", "uci_dropout.py", "uci_ensembles.py"),
    ]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"must hold the file table.txt, but .* does not exist"):
        run(tmp_path, made_up(files=("table.txt",)))


def test_the_seconds_of_a_part_are_measured(tmp_path):
    assert all(result.seconds > 0 for result in run(tmp_path).results.values())


def test_cells_of_no_results_are_none():
    assert cells(made_up(), {}) == []


@pytest.mark.parametrize("name", PROTOCOLS)
def test_published_numbers_are_of_rows_and_measures_of_the_protocol(name):
    protocol = runner.load_protocol(name)
    assert protocol.name == name
    for (_, measure), number in protocol.published.items():
        assert measure in protocol.measures
        if isinstance(number, Statement):
            assert protocol.measures[measure].is_difference
            continue
        assert math.isfinite(number.value)
        assert number.spread is None or float(number.spread) >= 0
    # A part may have several rows; the tests of these protocols read them.
    if name not in ("mnist-dropout", "srivastava-figures"):
        assert {row for row, _ in protocol.published} == set(protocol.parts)


def test_a_published_line_is_read():
    numbers = published._numbers({"a": "1.50±0.10 -"}, ("x", "y"), {"a": 5})
    assert numbers == {("a", "x"): Published("1.50", "0.10", 5)}
    assert numbers["a", "x"].decimals == 2


def test_the_command_runs_a_protocol(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jdrop.study.reproduce.command.load_protocol", lambda name: made_up())
    arguments = ["reproduce", "uci-dropout", "--data-dir", str(tmp_path), "--fraction", "0.5"]
    assert run_command([*arguments, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 comparisons with published means agree" in printed
    assert printed.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    command = json.loads((tmp_path / "out" / "results.json").read_text())["command"]
    assert command.startswith("jdrop reproduce uci-dropout")


def test_the_folder_depends_on_the_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jdrop.study.reproduce.command.load_protocol", lambda name: made_up())
    assert run_command(["reproduce", "uci-dropout", "--data-dir", ".", "--splits", "2"]) == 0
    assert (tmp_path / "reproduction" / "uci-dropout-splits-2" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["uci-nothing"], "is not one of 'uci-dropout'"),
        (["uci-dropout", "--fraction", "0"], "0 is not in the range"),
        (["uci-dropout", "--splits", "0"], "0 is not in the range"),
        (["uci-dropout"], "uci/yacht.txt"),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path, capsys, arguments, message):
    assert run_command(["reproduce", *arguments, "--data-dir", str(tmp_path)]) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_worth_stands_with_its_interval_and_infinity_is_a_string():
    measures = {"worth": Measure("worth", "So many networks.")}
    protocol = dataclasses.replace(made_up(), measures=measures, published={})
    beyond = EnsembleEquivalent(math.inf, 2.5, math.inf, largest=4)
    result = PartResult({"Yacht": {}}, 1, 1, 0.0, {"Yacht": {"worth": beyond}})
    shown = cells(protocol, {"Yacht": result})
    reproduction = runner.Reproduction(
        protocol, shown, {"Yacht": result}, {"fraction": 1.0, "splits": None}, {}
    )
    assert report.rows(reproduction) == [["Yacht", "worth", "", ">4 [2.5, >4]", "", "", "0.0"]]
    text = report.to_json(reproduction, "")
    assert json.loads(text)["cells"][0]["ours"]["value"] == "Infinity"
    assert report.draw(reproduction) is None
