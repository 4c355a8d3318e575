"""The report of a made-up comparison: tables, figures, pages, and the JSON behind them."""

import csv
import dataclasses
import io
import itertools
import json
import math
import re

import made_up
import pytest
from matplotlib.text import Text
from rich.console import Console

from jdrop.statistics import Interval
from jdrop.study import report
from jdrop.study.errors import UserError
from jdrop.study.methods import METHODS
from jdrop.study.report import csv_files, page, tables
from jdrop.study.report.captions import TITLES, captions
from jdrop.study.report.figures import FIGURES
from jdrop.study.report.numbers import difference_text, ends_text, signed_text
from jdrop.study.results import Comparison
from jdrop.study.scores import COSTS, SCORES

ODD_NAME = "$x$ a{b} [red]c|d"


@pytest.fixture(scope="module")
def comparison():
    """All that a report can show, with a method whose name holds every kind of markup."""
    return made_up.with_given(made_up.comparison(), ODD_NAME)


@pytest.fixture(scope="module")
def without_costs(comparison):
    return made_up.without_costs(comparison)


@pytest.fixture(scope="module")
def folder(comparison, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    report.write(comparison, out)
    return out


def test_every_file_is_complete_and_needs_no_other(folder, comparison):
    drawn = {f"{name}.png" for name in FIGURES}
    texts = {"results.json", "results.schema.json", "scores.csv", "sweep.csv"}
    texts |= {"report.md", "report.html"}
    assert {path.name for path in folder.iterdir()} == drawn | texts
    html = (folder / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html)
    assert "@import" not in html
    labels = re.findall(r'role="img"[^>]*aria-label="([^"]+)"', html)
    assert len(labels) == len(drawn)
    assert all(len(label) > 60 for label in labels)
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len({*identifiers})
    first, *others = report.answer(comparison)
    assert f"<p>{first}</p>" in html
    markdown = (folder / "report.md").read_text()
    assert f"**{first}**" in markdown
    for item in (*others, *report.cautions(comparison)):
        assert f"<li>{item}</li>" in html
        assert f"\n- {item}\n" in markdown
    for name in drawn:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in markdown


def test_each_figure_has_a_title_and_a_caption(comparison):
    assert {*FIGURES} == {*TITLES} == {*captions(comparison)}


def test_the_caption_of_all_masks_says_which_nll_is_lower(comparison):
    exact = dataclasses.replace(
        comparison.exact,
        nonlinearity_gap={"nll": Interval(0.0022, -0.0047, 0.0065, 5)},
        pool_gap={"nll": Interval(-0.0919, -0.1326, -0.021, 5)},
        weight_scaling={"error": Interval(0.573, 0.413, 0.672, 5)},
    )
    text = captions(dataclasses.replace(comparison, exact=exact))["exact"]
    assert "its test error is 57.3 [41.3, 67.2] %" in text
    assert "Weight scaling has an NLL higher by 0.0022 [−0.0047, 0.0065] nats than the geo" in text
    assert "mean has an NLL lower by 0.0919 [0.0210, 0.1326] nats than the arithmetic mean" in text


def test_the_gap_between_two_errors_is_in_points(comparison):
    text = captions(comparison)["overfitting"]
    gap = comparison.overfitting[-1].gap["error"]
    assert f"test error minus the training error is {difference_text('error', gap)} points" in text


def test_figures_without_results_are_not_drawn(without_costs):
    drawn = {name for name, draw in FIGURES.items() if draw(without_costs) is not None}
    assert drawn == {
        *("difference", "score_against_size", "worth_chart"),
        *("mask_curve", "diversity", "calibration"),
    }


def legend_labels(figure):
    """What the legend of the first panel names, without the worths."""
    return [text.get_text().split(": ")[0] for text in figure.axes[0].get_legend().get_texts()]


def test_a_line_marks_the_score_of_each_given_method(without_costs, comparison):
    """A run that trained its methods shows the main ones only."""
    main = ["average of plain networks", "one dropout", "dropout, 50 masks"]
    draw = FIGURES["score_against_size"]
    assert legend_labels(draw(comparison)) == main
    given = draw(without_costs)
    assert legend_labels(given) == [*main, rf"{ODD_NAME}, one".replace("$", r"\$")]
    mean = without_costs.method(ODD_NAME).points[0].over_seeds["nll"].mean
    (line,) = (line for line in given.axes[0].lines if "{b}" in line.get_label())
    assert list(line.get_ydata()) == [mean, mean]


def test_given_methods_differ_in_their_lines(without_costs):
    names = ["first", "second", "third"]
    given = without_costs
    for name in names:
        given = made_up.with_given(given, name)
    figure = FIGURES["score_against_size"](given)
    styles = {
        line.get_label().split(",")[0]: line.get_linestyle()
        for line in figure.axes[0].lines
        if not line.get_label().startswith("_")
    }
    assert {*names} < {*styles}
    assert len({styles[name] for name in names}) == 3


@pytest.mark.parametrize("names", [("rate", "train_size"), ("rate", "train_size", "label_noise")])
def test_a_sweep_of_several_settings_is_drawn_as_grids(comparison, names):
    template = comparison.sweep[0]
    cells = [
        dataclasses.replace(template, at=dict(zip(names, values, strict=True)))
        for values in itertools.product(*[(0.0, 0.1), (1.0, 2.0), (3.0, 4.0, 5.0)][: len(names)])
    ]
    figure = FIGURES["sweep"](dataclasses.replace(comparison, sweep=cells))
    visible = [axes for axes in figure.axes if axes.get_visible()]
    assert len(visible) == (1 if len(names) == 2 else 3)
    assert all(len(axes.texts) == 4 for axes in visible)


def test_a_name_with_markup_is_shown_as_it_is(folder, comparison):
    title = comparison.method(ODD_NAME).title(1)
    assert title == f"{ODD_NAME}, one"
    terminal = io.StringIO()
    Console(width=200, file=terminal).print(report.terminal(comparison))
    assert title in terminal.getvalue()
    assert title in (folder / "report.html").read_text()
    assert title.replace("|", r"\|") in (folder / "report.md").read_text()
    figure = FIGURES["worth_chart"](comparison)
    figure.draw_without_rendering()
    (label,) = (
        text.get_text() for text in figure.axes[0].get_yticklabels() if "x" in text.get_text()
    )
    assert label == title.replace("$", r"\$")


def test_unknown_costs_are_left_out(without_costs):
    rows = csv.DictReader(csv_files.scores_csv(without_costs).splitlines())
    assert all({row[name] for name in COSTS} == {""} for row in rows)
    for template in ("report.md.jinja", "report.html.jinja"):
        text = page.render(template, without_costs, [])
        assert "FLOPs" not in text
        assert "Each interval stands alone" in text
    assert tables.cost_table(without_costs) == ([], [])
    assert report.terminal(without_costs).columns[-1].header.strip() == "enough?"


def test_the_note_tells_rows_of_a_single_given_network(comparison):
    assert "A row without ± is of one given network" in tables.score_note(comparison)
    retrained = [dataclasses.replace(method, retrained=True) for method in comparison.methods]
    all_retrained = dataclasses.replace(comparison, methods=retrained)
    assert "given network" not in tables.score_note(all_retrained)


def test_the_csv_holds_every_score_in_both_views(folder, comparison):
    rows = list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))
    views = {"own epochs": comparison.methods, "same epochs": comparison.same_epochs}
    for view, methods in views.items():
        count = sum(len(point.scores) for method in methods for point in method.points)
        assert sum(row["view"] == view for row in rows) == count
    # Readers that know of no views find the rows of each method's own epochs first.
    assert rows[0]["view"] == "own epochs"
    row = next(r for r in rows if (r["method"], r["size"], r["score"]) == ("dropout", "1", "nll"))
    point = comparison.method("dropout").point(1)
    assert float(row["mean"]) == point.scores["nll"].mean
    assert float(row["minus_single"]) == point.minus_single["nll"].mean
    assert float(row["minus_ensemble_low"]) == point.minus_ensemble["nll"].low
    assert float(row["minus_headline_high"]) == point.minus_headline["nll"].high
    assert float(row["worth_high"]) == point.worth["nll"].high
    assert row["verdict"] == point.against_ensemble["nll"].verdict
    assert float(row["p_value"]) == point.against_ensemble["nll"].p_value
    assert float(row["train_flops"]) == point.cost.train_flops
    assert float(row["search_flops"]) == point.cost.search_flops
    assert (row["epochs"], row["weight_decay"], row["unreliable"]) == ("75", "", "False")
    assert {row["score"] for row in rows} <= {*SCORES}


def test_the_csv_of_an_untuned_comparison_has_the_same_epochs_only(without_costs):
    rows = csv.DictReader(csv_files.scores_csv(without_costs).splitlines())
    assert {row["view"] for row in rows} == {"same epochs"}


def test_the_csv_keeps_proportions_within_0_and_1(comparison):
    beyond = Interval(0.99, 0.97, 1.01, 5)
    scores = {**comparison.method("dropout").points[0].scores, "error": beyond}
    changed = made_up.with_point(comparison, "dropout", scores=scores)
    rows = csv.DictReader(csv_files.scores_csv(changed).splitlines())
    row = next(r for r in rows if (r["method"], r["score"]) == ("dropout", "error"))
    assert (row["low"], row["high"]) == ("0.97", "1.0")


def test_the_csv_of_a_sweep_holds_every_cell(folder, comparison):
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    cell = comparison.sweep[0]
    assert len(rows) == sum(len(s) for cell in comparison.sweep for s in cell.scores.values())
    row = next(r for r in rows if (r["networks"], r["score"]) == ("dropout", "nll"))
    assert float(row["rate"]) == cell.at["rate"]
    assert float(row["mean"]) == cell.scores["dropout"]["nll"].mean
    assert float(row["worth_low"]) == cell.worth["nll"].low
    assert next(r for r in rows if r["networks"] == "plain")["worth"] == ""


def test_json_comes_back_and_has_a_schema(folder):
    text = (folder / "results.json").read_text()
    assert Comparison.from_json(text).to_json() == text
    assert json.loads(text)["schema_version"] == 2
    assert json.loads(text)["methods"][0]["name"] == "plain"
    schema = json.loads((folder / "results.schema.json").read_text())
    assert "method" in schema["$defs"]["MethodResult"]["description"]


def test_unknown_costs_come_back_from_json(without_costs):
    text = without_costs.to_json()
    assert json.loads(text)["methods"][0]["points"][0]["cost"] is None
    assert Comparison.from_json(text).to_json() == text


def test_other_json_is_refused(folder):
    text = (folder / "results.json").read_text()
    with pytest.raises(UserError, match="results must be complete JSON"):
        Comparison.from_json(text[: len(text) // 2])
    for other in ({**json.loads(text), "schema_version": 1}, {}, []):
        with pytest.raises(UserError, match="must have the schema_version 2, got"):
            Comparison.from_json(json.dumps(other))


def test_a_comparison_is_shown_in_a_few_lines(comparison):
    lines = repr(comparison).splitlines()
    assert lines[0].startswith("Comparison on 'made up', classification, 5 replicates; NLL minus")
    point = comparison.method("dropout").point(1)
    minus = point.minus_ensemble["nll"]
    assert lines[1] == (
        f"  one dropout: {minus.mean:+.3f} [{minus.low:+.3f}, {minus.high:+.3f}], worth "
        f"{point.worth['nll']}"
    )
    assert len(lines) == 1 + sum(method.name != "plain" for method, _ in comparison.table)


def cells(table, row_title):
    """A row of a table, by the columns."""
    header, rows = table
    (row,) = (row for row in rows if row[0] == row_title)
    assert len(row) == len(header)
    return dict(zip(header, row, strict=True))


def test_simple_models_are_the_last_rows(comparison):
    _, rows = tables.score_table(comparison)
    assert rows[-1][0] == "logistic regression"
    assert rows[-2][0] == f"{ODD_NAME}, one"


def test_weight_scaling_of_the_same_networks_follows_the_masks(comparison):
    titles = [row[0] for row in tables.score_table(comparison)[1]]
    assert titles[titles.index("dropout, 50 masks") + 1] == "same, no masks"
    note = tables.score_note(comparison)
    minus = comparison.mask_curve.minus_weight_scaling["nll"]
    assert "The row “same, no masks” is of these networks too" in note
    assert f"all masks minus weight scaling is {difference_text('nll', minus)} nats in NLL" in note
    assert "same, no masks" not in tables.score_note(
        dataclasses.replace(comparison, methods=comparison.methods[:3])
    )


def test_a_simple_model_far_from_all_networks_does_not_squeeze_them(comparison):
    far = {"nll": Interval(2.1, 2.0, 2.2, 5)}
    changed = made_up.with_point(comparison, "logistic-regression", minus_ensemble=far)
    axes = FIGURES["difference"](changed).axes[0]
    assert axes.get_xlim()[1] < 0.3
    assert "2.10 →" in [text.get_text() for text in axes.texts]
    assert "→" not in " ".join(
        text.get_text() for text in FIGURES["difference"](comparison).axes[0].texts
    ).replace("worse →", "")


def test_the_difference_table_has_both_references_and_the_interval_of_the_verdict(comparison):
    table = tables.difference_table(comparison, "nll")
    row = cells(table, "one dropout")
    point = comparison.method("dropout").point(1)
    single, test = point.minus_single["nll"], point.against_ensemble["nll"]
    expected = f"{single.mean:+.4f} [{single.low:+.4f}, {single.high:+.4f}]".replace("-", "−")
    assert row["NLL − one plain, nats"] == expected
    decides = f"[{test.difference.low:+.4f}, {test.difference.high:+.4f}]".replace("-", "−")
    assert row["its 90 % interval"] == decides
    assert row["enough?"] == test.verdict == "not worse"
    assert row["p"] == f"{test.p_value:.2g}"
    errors = tables.difference_table(comparison, "error")
    assert cells(errors, "one dropout")["error − average of 10, points"].startswith("−0.35 [")


def test_plain_networks_have_verdicts_but_for_the_average_of_all(comparison):
    table = tables.difference_table(comparison, "nll")
    assert cells(table, "one plain")["enough?"] == "worse"
    reference = cells(table, "10 plain")
    assert [*reference.values()][2:] == ["", "", "", ""]
    texts = [text.get_text() for text in FIGURES["difference"](comparison).axes[0].texts]
    assert texts.count("worse") == sum(
        point.against_ensemble["nll"].verdict == "worse" for _, point in comparison.table
    )


def test_the_first_figure_draws_the_interval_of_the_verdict_thick(comparison):
    lines = FIGURES["difference"](comparison).axes[0].lines
    point = comparison.method("dropout").point(1)
    test, minus = point.against_ensemble["nll"], point.minus_ensemble["nll"]
    widths = {
        tuple(line.get_xdata()): line.get_linewidth()
        for line in lines
        if len(line.get_xdata()) == 2
    }
    thick, thin = (widths[each.low, each.high] for each in (test.difference, minus))
    assert thick > 3 * thin


def test_the_costs_of_the_answer_can_be_computed_from_the_table(comparison):
    table = tables.cost_table(comparison)
    plain, dropout = (
        {name: float(cell.replace(",", "")) for name, cell in list(cells(table, row).items())[1:]}
        for row in ("one plain", "one dropout")
    )
    for row in (plain, dropout):
        assert row["training"] + row["search"] == pytest.approx(row["training with search"])
    ratio = dropout["training with search"] / plain["training with search"]
    assert f"costs {ratio:.1f}x that of one plain network, also" in report.answer(comparison)[-1]


def test_unreliable_scores_are_marked_and_have_no_worth(comparison):
    changed = made_up.with_point(comparison, "dropout", unreliable=["calibrated_nll"])
    scores = cells(tables.score_table(changed), "one dropout")
    assert scores["calibrated NLL, nats"].endswith("†")
    assert not scores["NLL, nats"].endswith("†")
    assert cells(tables.worth_table(changed), "one dropout")["calibrated NLL"] == "n/a"
    assert "marked † are unreliable" in page.render("report.md.jinja", changed, [])
    assert "†" not in page.render("report.md.jinja", comparison, [])


def test_own_epochs_stand_beside_the_same_epochs(comparison, without_costs):
    row = cells(tables.epochs_table(comparison), "one dropout")
    assert row["own: epochs"] == "75"
    point = comparison.method("dropout").point(1)
    assert row["own: enough?"] == point.against_ensemble["nll"].verdict
    assert {"50 epochs: NLL, nats", "50 epochs: worth", "50 epochs: enough?"} <= {*row}
    assert tables.epochs_table(without_costs) == ([], [])


def test_methods_with_the_same_epochs_only_have_half_a_row(comparison):
    methods = [method for method in comparison.methods if method.name != "early-stopping"]
    row = cells(
        tables.epochs_table(dataclasses.replace(comparison, methods=methods)), "early stopping"
    )
    assert {cell for name, cell in row.items() if name.startswith("own: ")} == {""}
    assert "" not in {cell for name, cell in row.items() if name.startswith("50 epochs: ")}


def test_the_sweep_is_a_table(folder, comparison):
    header, rows = tables.sweep_table(comparison)
    assert [row[0] for row in rows] == ["0.1", "0.5"]
    assert rows[0][-1] == str(comparison.sweep[0].worth["nll"])
    assert header[1] == "NLL, nats: one plain"
    assert "## Sweep" in (folder / "report.md").read_text()
    assert "<h2>Sweep</h2>" in (folder / "report.html").read_text()


def test_the_influence_table_counts_examples(comparison):
    found = comparison.influence[1]
    row = cells(tables.influence_table(comparison), "NLL: one dropout − 10 plain")
    assert row["half comes from"] == f"{found.half} examples"
    assert row["better on"] == f"{100 * found.share_better:.0f} %"
    assert row["without the top 5"] == signed_text("nll", found.without["5"])
    assert row["gains"] == signed_text("nll", min(found.cumulative))
    assert "without one writer" not in row


def test_the_influence_table_leaves_out_the_largest_group(comparison):
    influence = [
        dataclasses.replace(found, largest_group="7", without_largest_group=-0.0012)
        for found in comparison.influence
    ]
    data = {**comparison.data, "group_name": "writer", "num_groups": 13}
    grouped = dataclasses.replace(comparison, influence=influence, data=data)
    row = cells(tables.influence_table(grouped), "NLL: one dropout − 10 plain")
    assert row["without one writer"] == "7: −0.0012"


def test_values_show_under_the_pointer(folder, comparison):
    html = (folder / "report.html").read_text()
    titles = re.findall(r"<g><title>([^<]*)</title>", html)
    point = comparison.method("dropout").point(1)
    difference = difference_text("nll", point.minus_ensemble["nll"], unit=True)
    decides = ends_text("nll", point.against_ensemble["nll"].difference)
    hover = f"one dropout minus 10 plain: {difference}; 90 % interval {decides}; not worse"
    assert hover in titles
    assert any("$x$ a{b} [red]c|d, one" in title for title in titles)
    assert "hover:" not in html


@pytest.mark.slow
def test_legends_lie_outside_the_data(comparison):
    for name, draw in FIGURES.items():
        figure = draw(comparison)
        figure.draw_without_rendering()
        boxes = [axes.get_window_extent() for axes in figure.axes if axes.get_visible()]
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
        for legend in legends:
            if legend is not None:
                assert not any(legend.get_window_extent().overlaps(box) for box in boxes), name


def test_each_method_has_a_color_of_its_own():
    colors = [method.color for method in METHODS.values()]
    assert len({*colors}) == len(colors)


@pytest.mark.slow
def test_figures_fit_a_narrow_screen(comparison):
    for name, draw in FIGURES.items():
        figure = draw(comparison)
        figure.draw_without_rendering()
        # At 350 of 390 pixels a letter of 9 points is 350 / (72 * 6.4) * 9 = 6.8 pixels high.
        assert figure.get_figwidth() <= 6.4, name
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
        assert min(sizes, default=9) >= 9, name


def test_a_worth_that_is_not_resolved_is_no_point(comparison):
    def markers(compared):
        figure = FIGURES["worth_chart"](compared)
        return sum(line.get_marker() == "s" for line in figure.axes[0].lines)

    worth = comparison.method("dropout").points[0].worth
    unresolved = {s: dataclasses.replace(w, low=1.0, high=math.inf) for s, w in worth.items()}
    changed = made_up.with_point(comparison, "dropout", worth=unresolved)
    assert markers(changed) == markers(comparison) - 1
