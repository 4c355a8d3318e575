"""The atlas: which studies run, in which order, and what its table, figure and sentences say."""

import dataclasses
import json
import math
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
from made_up import comparison as made_up_comparison

from jdrop.statistics import EnsembleEquivalent, Interval
from jdrop.study import command
from jdrop.study.atlas import cells, report
from jdrop.study.atlas import command as atlas_command
from jdrop.study.atlas.cells import Cell, Group
from jdrop.study.atlas.figure import BEYOND, COLORS, draw
from jdrop.study.atlas.report import Atlas
from jdrop.study.atlas.rows import MOST_EPOCHS_NOTE, Row, row_of, rows_of_studies
from jdrop.study.cli import run_command
from jdrop.study.data import DataError
from jdrop.study.report.csv_files import scores_csv
from jdrop.study.report.numbers import difference_text
from jdrop.study.results import Comparison
from jdrop.study.settings import Settings

TINY = {"replicates": 3, "ensemble-size": 2, "budget": 2, "num-samples": 2, "batch-size": 20}
NARROW, WIDE = (Cell("digits", 60, units=units) for units in (4, 8))
GROUPS = [
    Group("Digits: units", lambda cell: str(cell.units), (WIDE, NARROW)),
    Group("Digits again", lambda cell: f"{cell.train_size:,}", (NARROW,)),
    Group("MNIST", lambda cell: f"{cell.train_size:,}", (Cell("mnist", 300),)),
]


@pytest.fixture(autouse=True)
def tiny_cells(monkeypatch):
    """Two tiny cells, and one whose data are absent."""
    monkeypatch.setattr(cells, "SHARED", TINY)
    monkeypatch.setattr(cells, "SHARED_FLAGS", ("--no-theory", "--no-controls"))
    monkeypatch.setattr(cells, "STEPS", 6)
    monkeypatch.setattr(cells, "MIN_EPOCHS", 1)
    monkeypatch.setattr(atlas_command, "make_groups", lambda: GROUPS)


def made_up_train(options, command_line, console):
    """Stands for the training of a cell: made-up numbers with the settings of the cell."""
    folder = Path(options["out"])
    folder.mkdir(parents=True)
    full = made_up_comparison()
    names = [setting.name for setting in dataclasses.fields(Settings)]
    return (
        dataclasses.replace(
            full,
            command=command_line,
            settings={**full.settings, **{name: options[name] for name in names}},
            data={**full.data, "train_size": options["train_size"]},
            versions={"jdrop": version("jdrop")},
            seconds={"this run": 60.0 * options["hidden"][0]},
        ),
        folder,
    )


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder of an atlas of two made-up cells, and the cells in the order in which they ran."""
    order = []

    def train(options, *arguments):
        order.append(Path(options["out"]).name)
        return made_up_train(options, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(command, "train", train)
        assert run_command(["atlas", "--out", str(tmp_path / "atlas")]) == 0
    return tmp_path / "atlas", order


def results(folder, cell):
    path = folder / "cells" / cell.name / "results.json"
    return Comparison.from_json(path.read_text(encoding="utf-8"))


def row(title="a", verdict="worse", **changes):
    values = {
        "title": title,
        "data": title,
        "source": "",
        "train_size": 10,
        "units": 4,
        "rate": 0.5,
        "label_noise": 0.0,
        "score": "nll",
        "ensemble_size": 10,
        "plain": 0.5,
        "dropout": 0.4,
        "average": 0.3,
        "minus_single": Interval(-0.1, -0.2, -0.05, 5),
        "minus_ensemble": Interval(0.1, 0.05, 0.2, 5),
        "plain_minus_ensemble": Interval(0.2, 0.1, 0.3, 5),
        "worth": EnsembleEquivalent(2.0, 1.5, 3.0, 10),
        "verdict": verdict,
        "second_score": "error",
        "second_worth": EnsembleEquivalent(2.0, 1.5, 3.0, 10),
        "control_does_as_well": None,
        "dropout_has_most_epochs": None,
        "average_has_most_epochs": None,
        "minutes": 1.0,
        "command": None,
    }
    return Row(**{**values, **changes})


def atlas_of(*rows, stored=()):
    by_cell = {Cell("digits", index): row for index, row in enumerate(rows)}
    groups = [Group("digits", lambda cell: by_cell[cell].title, tuple(by_cell))]
    return Atlas(groups, by_cell, stored, [], {}, [], "")


def sentences(*rows, stored=()):
    return report.answer(atlas_of(*rows, stored=stored))


def test_the_cheapest_cell_runs_first(finished):
    assert finished[1] == [NARROW.name, WIDE.name]


def test_the_most_costly_cells_are_those_of_most_examples_and_parameters():
    ordered = cells.by_cost(cells.make_groups())
    assert [cell.cost for cell in ordered] == sorted(cell.cost for cell in ordered)
    assert ordered[0].units == 16
    assert {(cell.data, cell.train_size) for cell in ordered[-2:]} == {
        ("mnist", 10_000),
        ("fashion-mnist", 10_000),
    }


def test_all_cells_have_folders_and_titles_of_their_own():
    ordered = cells.by_cost(cells.make_groups())
    assert len({cell.name for cell in ordered}) == len({cell.title for cell in ordered}) == 25


def test_a_cell_in_two_groups_runs_once(finished):
    assert len(finished[1]) == len(set(finished[1])) == 2


def test_the_table_holds_the_numbers_of_the_studies(finished):
    folder, _ = finished
    atlas = json.loads((folder / "atlas.json").read_text(encoding="utf-8"))
    for cell, study, line in zip(
        (WIDE, NARROW), atlas["studies"], atlas["table"]["rows"], strict=True
    ):
        comparison = results(folder, cell)
        point = comparison.method("dropout").point(1)
        assert study["dropout"] == point.scores["nll"].mean
        assert study["plain"] == comparison.single.scores["nll"].mean
        assert study["average"] == comparison.ensemble.scores["nll"].mean
        assert study["minus_ensemble"]["low"] == point.minus_ensemble["nll"].low
        plain_minus_average = comparison.single.minus_ensemble["nll"]
        assert study["plain_minus_ensemble"]["low"] == plain_minus_average.low
        assert study["minutes"] == cell.units
        columns = dict(zip(atlas["table"]["header"], line, strict=True))
        assert columns["units"] == str(cell.units)
        assert columns["dropout − average"] == difference_text("nll", point.minus_ensemble["nll"])
        assert columns["worth"] == str(point.worth["nll"])
        assert columns["enough?"] == point.against_ensemble["nll"].verdict


def test_the_folder_holds_the_page_and_the_figure(finished):
    folder, _ = finished
    assert (folder / "atlas.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "atlas.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert results(folder, WIDE).command.replace("'", "&#39;") in page
    assert "atlas.png" in (folder / "atlas.md").read_text(encoding="utf-8")


def test_data_that_are_absent_are_left_out_with_a_sentence(finished):
    atlas = json.loads((finished[0] / "atlas.json").read_text(encoding="utf-8"))
    assert atlas["left_out"] == ["mnist was left out: its files need --data-dir."]
    assert "mnist was left out" in (finished[0] / "atlas.html").read_text(encoding="utf-8")


def test_a_folder_without_the_files_leaves_data_out(tmp_path):
    assert str(tmp_path / "mnist") in Cell("mnist", 300).missing(tmp_path)
    assert "yacht.txt" in Cell("yacht", 246).missing(tmp_path)
    assert Cell("digits", 300).missing(None) is None
    (tmp_path / "mnist").mkdir()
    assert Cell("mnist", 300).missing(tmp_path) is None


def test_a_complete_atlas_runs_nothing_again(finished, monkeypatch, capsys):
    def fail(*_):
        raise AssertionError("a complete cell ran again")

    monkeypatch.setattr(command, "train", fail)
    before = (finished[0] / "atlas.json").read_text(encoding="utf-8")
    assert run_command(["atlas", "--out", str(finished[0])]) == 0
    assert "Complete studies: 2; to run: 0;" in capsys.readouterr().out
    after = (finished[0] / "atlas.json").read_text(encoding="utf-8")
    assert json.loads(after)["studies"] == json.loads(before)["studies"]


def test_a_cell_with_other_settings_is_not_taken_for_complete(finished, monkeypatch):
    assert atlas_command._complete(NARROW, finished[0]) is not None
    monkeypatch.setattr(cells, "STEPS", 60)
    assert atlas_command._complete(NARROW, finished[0]) is None


def test_results_with_fewer_settings_or_of_another_version_are_not_taken_for_complete(finished):
    path = finished[0] / "cells" / NARROW.name / "results.json"
    stored = results(finished[0], NARROW)
    fewer = {name: value for name, value in stored.settings.items() if name != "seed"}
    for changes in ({"settings": fewer}, {"versions": {"jdrop": "0.0.1"}}):
        path.write_text(dataclasses.replace(stored, **changes).to_json(), encoding="utf-8")
        assert atlas_command._complete(NARROW, finished[0]) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema_version": 1}', '{"schema_version": 2}', "\udcff"]
)
def test_a_cell_with_damaged_results_runs_again(text, finished, monkeypatch):
    folder, _ = finished
    path = folder / "cells" / NARROW.name / "results.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    ran = []

    def train(options, *_):
        ran.append(Path(options["out"]).name)
        return dataclasses.replace(results(folder, WIDE), command=""), Path(options["out"])

    monkeypatch.setattr(command, "train", train)
    assert run_command(["atlas", "--out", str(folder)]) == 0
    assert ran == [NARROW.name]


@pytest.mark.slow
def test_the_printed_command_continues_the_same_study(tmp_path, monkeypatch):
    """The command finds all parts complete: it is of the same identity, so nothing trains."""
    groups = [Group("Digits", lambda cell: str(cell.units), (NARROW,))]
    monkeypatch.setattr(atlas_command, "make_groups", lambda: groups)
    assert run_command(["atlas", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "cells" / NARROW.name
    parts = {path: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()}
    shown = []
    monkeypatch.setattr(command, "show", lambda comparison, *_: shown.append(comparison))
    arguments = shlex.split(results(tmp_path, NARROW).command)[1:]
    assert run_command([*arguments, "--out", str(folder)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()} == parts
    assert shown[0].to_json() == results(tmp_path, NARROW).to_json()


def test_a_cell_that_fails_is_shown_and_does_not_end_the_atlas(tmp_path, monkeypatch, capsys):
    def train(options, *arguments):
        if options["hidden"][0] == NARROW.units:
            raise DataError("the data\n are damaged.")
        return made_up_train(options, *arguments)

    monkeypatch.setattr(command, "train", train)
    assert run_command(["atlas", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: these studies failed: {NARROW.title}. ")
    atlas = json.loads((tmp_path / "atlas.json").read_text(encoding="utf-8"))
    assert atlas["failed"] == {NARROW.title: "the data are damaged."}
    assert [study["units"] for study in atlas["studies"]] == [WIDE.units]
    assert "the data are damaged." in (tmp_path / "atlas.html").read_text(encoding="utf-8")
    # The same command tries it again.
    monkeypatch.setattr(command, "train", made_up_train)
    assert run_command(["atlas", "--out", str(tmp_path)]) == 0


def test_the_report_is_drawn_after_each_cell(tmp_path, monkeypatch):
    seen = []

    def train(*arguments):
        seen.append(json.loads((tmp_path / "atlas.json").read_text(encoding="utf-8")))
        return made_up_train(*arguments)

    monkeypatch.setattr(command, "train", train)
    assert run_command(["atlas", "--out", str(tmp_path)]) == 0
    assert [len(atlas["studies"]) for atlas in seen] == [0, 1]
    assert [atlas["not_run"] for atlas in seen] == [[NARROW.title, WIDE.title], [WIDE.title]]
    assert seen[0]["answer"] == ["No study is complete yet."]
    assert seen[1]["answer"][-1] == f"Not run yet: {WIDE.title}."


def test_a_table_keeps_features_and_target_alone(tmp_path):
    table = cells.TABLES["naval-propulsion-plant"]
    num_columns = table.num_features + 2
    (tmp_path / "uci").mkdir()
    line = " ".join(f"{0.1 * column}" for column in range(num_columns))
    (tmp_path / table.file).write_text(f"{line}\n" * table.num_rows)
    cell = Cell("naval-propulsion-plant", 2000)
    cell.write_table(tmp_path, tmp_path)
    written = cell.table_path(tmp_path).read_text().splitlines()
    assert len(written) == cells.MAX_TABLE_ROWS + cells.MAX_TEST_ROWS
    assert [float(number) for number in written[0].split()] == [
        float(number) for number in line.split()[: num_columns - 1]
    ]
    assert cell.arguments(tmp_path, tmp_path)[2:4] == ["--target", str(table.num_features)]


def test_the_sentences_name_studies_whose_epochs_are_the_last_candidate():
    *_, dropout, average = sentences(
        row("first", dropout_has_most_epochs=True, average_has_most_epochs=False),
        row("second", dropout_has_most_epochs=False, average_has_most_epochs=False),
        stored=[row("stored")],
    )
    assert dropout.startswith("Dropout trained for the most epochs")
    assert dropout.endswith("1 of 2 studies (first).")
    assert average.startswith("The average trained for the most epochs")
    assert average.endswith("0 of 2 studies.")


@pytest.mark.parametrize("method", ["dropout", "average"])
def test_studies_whose_epochs_are_the_last_candidate_have_a_dagger(method):
    marked = row("first", **{f"{method}_has_most_epochs": True})
    atlas = atlas_of(marked, row("second", **{f"{method}_has_most_epochs": False}))
    assert [line[0] for line in report.table_rows(atlas)] == ["first †", "second"]
    assert report.notes(atlas)[0] == f"{MOST_EPOCHS_NOTE}."
    (axes,) = draw(atlas.grouped_rows).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first †", "second"]
    assert MOST_EPOCHS_NOTE in axes.get_xlabel().splitlines()


def test_without_a_dagger_no_note_explains_it():
    atlas = atlas_of(row())
    assert MOST_EPOCHS_NOTE not in "".join(report.notes(atlas))
    assert MOST_EPOCHS_NOTE not in draw(atlas.grouped_rows).axes[0].get_xlabel()


def test_the_last_candidate_is_found_in_the_cross_validation():
    comparison = made_up_comparison()
    curve = dataclasses.replace(comparison.tuning[0], method="dropout", size=1)
    for chosen in (curve.epochs[0], curve.epochs[-1]):
        tuning = [dataclasses.replace(curve, chosen=chosen)]
        tuned = dataclasses.replace(comparison, tuning=tuning, seconds={"this run": 60.0})
        found = row_of(tuned, "", data="", source="", units=4, rate=0.5)
        assert found.dropout_has_most_epochs == (chosen == curve.epochs[-1])
        assert not found.average_has_most_epochs


def test_the_sentences_count_and_name_the_studies():
    texts = sentences(
        row("first", "better", control_does_as_well=True),
        row("second", "equivalent", control_does_as_well=False),
        row("third", "not worse"),
        row("fourth", "worse"),
        row("fifth", "worse", minus_single=Interval(0.0, -0.1, 0.1, 5)),
        row("sixth", "undecided"),
        row("seventh", "refused"),
        stored=[row("eighth", "worse")],
    )
    assert "better than the average" in texts[0]
    for text, share in zip(
        texts,
        (
            "in 1 of 7 studies (first) and in 0 of 1 stored study.",
            "in 2 of 7 studies (second; third) and in 0 of 1 stored study.",
            "in 2 of 7 studies (fourth; fifth) and in 1 of 1 stored study (eighth).",
            "in 1 of 2 studies (fifth) and in 0 of 1 stored study.",
            "in 2 of 7 studies (sixth; seventh) and in 0 of 1 stored study.",
            "in 1 of 2 studies (first).",
        ),
        strict=True,
    ):
        assert text.endswith(share)


@pytest.mark.parametrize(
    ("averaging", "is_named"),
    [
        (Interval(0.2, 0.1, 0.3, 5), True),
        (Interval(0.2, -0.1, 0.5, 5), False),
        (Interval(0.2, None, None, 1), False),
    ],
)
def test_only_averaging_helps_where_averaging_is_shown_to_help(averaging, is_named):
    found = row(minus_single=Interval(0.0, -0.1, 0.1, 5), plain_minus_ensemble=averaging)
    assert found.only_averaging_helps == is_named


@pytest.mark.parametrize(
    ("verdict", "as_well", "text"),
    [
        ("not worse", True, "enough too"),
        ("worse", True, "better than dropout"),
        ("worse", False, "no"),
        ("better", False, "no"),
        ("worse", None, ""),
    ],
)
def test_the_table_says_what_weight_decay_is(verdict, as_well, text):
    (line,) = report.table_rows(atlas_of(row("a", verdict, control_does_as_well=as_well)))
    assert line[report.HEADER.index("weight decay as well?")] == text


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_stored_studies_are_read_from_their_scores(task, tmp_path):
    comparison = made_up_comparison(task)
    folder = tmp_path / "net"
    folder.mkdir()
    # The second view, of equal epochs, has other numbers and must not be taken.
    header, *lines = scores_csv(comparison).splitlines()
    lines = [line for line in lines if line.startswith("own epochs")]
    others = [re.sub(r"\d\.\d+", "77.0", line).replace("own", "same", 1) for line in lines]
    text = "\n".join([header, *lines, *others])
    (folder / "scores.csv").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text("<title>shops &amp; homes: 5 examples</title>")
    (tmp_path / "no study").mkdir()
    (found,) = rows_of_studies(tmp_path)
    point = comparison.method("dropout").point(1)
    score = comparison.curve_scores[0]
    assert (found.title, found.data) == ("net", "net: shops & homes")
    assert found.minus_ensemble.mean == point.minus_ensemble[score].mean
    assert found.average == comparison.ensemble.scores[score].mean
    assert found.plain_minus_ensemble.low == comparison.single.minus_ensemble[score].low
    assert str(found.worth) == str(point.worth[score])
    assert found.verdict == point.against_ensemble[score].verdict


def test_scores_without_dropout_are_refused(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "scores.csv").write_text("method,size,score,mean\nplain,1,nll,0.5\n")
    with pytest.raises(DataError, match=r"scores\.csv of a report"):
        rows_of_studies(tmp_path)


def test_an_empty_cell_of_the_scores_is_named(tmp_path):
    (tmp_path / "net").mkdir()
    header, *lines = scores_csv(made_up_comparison()).splitlines()
    column = header.split(",").index("minus_ensemble_low")
    lines = [line.split(",") for line in lines]
    emptied = [[*line[:column], "", *line[column + 1 :]] for line in lines]
    text = "\n".join([header, *(",".join(line) for line in emptied)])
    (tmp_path / "net" / "scores.csv").write_text(text, encoding="utf-8")
    message = r"scores\.csv cannot .* minus_ensemble_low of dropout, size 1, score nll is empty"
    with pytest.raises(DataError, match=message):
        rows_of_studies(tmp_path)


def test_a_folder_without_reports_is_refused(tmp_path, capsys):
    (tmp_path / "studies").mkdir()
    arguments = ["--studies", str(tmp_path / "studies"), "--out", str(tmp_path / "atlas")]
    assert run_command(["atlas", *arguments]) == 1
    assert "--studies must be a folder of reports" in capsys.readouterr().err


def drawn_lines(found):
    """The ends of all visible lines of the row."""
    (axes,) = draw([("group", [("label", found)])]).axes
    return [tuple(line.get_xdata()) for line in axes.lines if line.get_alpha() != 0], axes


def test_the_figure_draws_the_interval_and_the_verdict():
    lines, axes = drawn_lines(row())
    assert lines == [(1.5, 3.0), (2.0,)]
    texts = {text.get_text(): text.get_color() for text in axes.texts}
    assert texts["worse"] == COLORS["worse"]


def test_worths_beyond_the_ends_of_the_axis_have_arrows():
    beyond, axes = drawn_lines(row(worth=EnsembleEquivalent(math.inf, 4.0, math.inf, 10)))
    assert beyond == [(4.0, BEYOND * 10), (BEYOND * 10,), (BEYOND * 10,)]  # Line, arrow, dot.
    assert axes.get_xticklabels()[-1].get_text() == ">10"
    assert axes.get_xticks()[-1] == BEYOND * 10
    below, _ = drawn_lines(row(worth=EnsembleEquivalent(1.0, 1.0, 1.0, 10)))
    assert below == [(1.0, 1.0), (1.0,), (1.0,)]


@pytest.mark.parametrize("low", [1.0, 2.0])
def test_a_study_of_fewer_networks_ends_at_its_largest_average(low):
    few = row(ensemble_size=4, worth=EnsembleEquivalent(3.0, low, math.inf, 4))
    (axes,) = draw([("group", [("few", few), ("many", row())])]).axes
    assert axes.lines[0].get_xdata()[1] == 4
    assert ">4" in [text.get_text() for text in axes.texts]
    assert ">10" not in [text.get_text() for text in axes.texts]


def test_the_figure_says_which_rows_are_one_study():
    found = row("digits 500")
    (axes,) = draw([("sizes", [("500", found)]), ("rates", [("0.5", found)])]).axes
    assert axes.get_xlabel().endswith("\nthe 2 rows of digits 500 are one study")


def test_an_unresolved_worth_is_a_hollow_line_without_a_point():
    lines, axes = drawn_lines(row(worth=EnsembleEquivalent(2.0, 1.0, math.inf, 10)))
    assert lines[0] == lines[1]
    assert [line.get_color() for line in axes.lines if line.get_alpha() != 0][1] == "white"
    assert len(lines) == 2


def test_no_figure_without_studies():
    assert draw([("group", [])]) is None
