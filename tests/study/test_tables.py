"""Arrays, tables and predictions of the user: what is read, and the message for each mistake."""

import os

import numpy as np
import pytest

from jdrop.study.data import (
    DataError,
    from_arrays,
    load_predictions,
    load_table,
    subset,
    with_label_noise,
)

OPTIONS = {
    "target": None, "task": None, "test_path": None, "train_size": None, "label_noise": 0.0,
    "seed": 0, "ood_path": None,
}  # fmt: skip

X = np.arange(40, dtype=np.float64).reshape(20, 2)
Y = np.arange(20) % 4


def table(path, **options):
    return load_table(path, **{**OPTIONS, **options})


def write(path, text):
    path.write_text(text)
    return path


def test_integer_labels_are_classes_and_floats_are_targets():
    classes = from_arrays("a", X, Y, X[:5], Y[:5])
    assert (classes.num_classes, classes.train_labels.dtype) == (4, np.int32)
    assert classes.ood_inputs.shape == (5, 2)
    np.testing.assert_array_equal(np.sort(classes.ood_inputs, 1), np.sort(X[:5], 1))
    targets = from_arrays("a", X, 3.0 * Y, X[:5], 3.0 * Y[:5])
    assert targets.is_regression
    assert targets.ood_inputs is None
    back = targets.train_labels * targets.target_scale + targets.target_mean
    np.testing.assert_allclose(back, 3.0 * Y, atol=1e-6)
    np.testing.assert_allclose(targets.train_labels.std(), 1, rtol=1e-6)
    np.testing.assert_allclose(targets.test_labels, targets.train_labels[:5])


NAN = np.where(np.arange(40).reshape(20, 2) == 7, np.nan, X)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((X.astype(str), Y, X, Y), "inputs must be numbers, got the dtype"),
        ((X[:, 0], Y, X, Y), r"inputs must be \[example, feature, \.\.\.\].*got the shape \(20,\)"),
        ((X[:0], Y[:0], X, Y), "inputs must be .* at least one"),
        (
            (NAN, Y, X, Y),
            r"inputs must be finite, but 1 of 40 values are not, the first at \(3, 1\)",
        ),
        ((X, Y, X[:, :1], Y), r"test_inputs must have examples of shape \(2,\).*got \(1,\)"),
        ((X, Y[:-1], X, Y), r"labels must hold one number for each of the 20 inputs.*\(19,\)"),
        ((X, np.eye(4)[Y], X, Y), r"one-hot labels into integers with `labels.argmax\(-1\)`"),
        ((X, Y - 1, X, Y), "labels must be classes from 0, got -1"),
        ((X, Y, X, Y * 1.0), "must both be integers .classes. or both floats"),
        ((X, Y * 2, X, Y * 2), "class 1 has none"),
        ((X, Y, X, Y + 1), "class 4 has none"),
        ((X, Y * 10**9, X, Y), "class 1 has none"),
        ((X, Y * 0, X, Y * 0), "at least 2 classes"),
        ((X, Y * 0 + 0.1, X, Y * 1.0), "labels must differ, got 0.1 for every"),
        ((X, Y * 1.0, X, Y * 1.0, X), "ood_inputs are for classification"),
        ((X, Y * 0.0, X, Y * 0.0), "labels must differ, got 0.0 for every"),
        ((X, Y.astype(str), X, Y), "labels must be integers .classes. or floats"),
        ((X, np.where(Y == 1, np.inf, Y), X, Y * 1.0), "labels must be finite, but 5 of 20"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, message):
    with pytest.raises(DataError, match=message):
        from_arrays("a", *arrays)


def test_an_npz_is_split_unless_it_holds_test_examples(tmp_path):
    whole, parts = tmp_path / "whole.npz", tmp_path / "parts.npz"
    np.savez(whole, inputs=X, labels=Y, ood_inputs=X[:3])
    np.savez(
        parts, train_inputs=X[:12], train_labels=Y[:12], test_inputs=X[12:], test_labels=Y[12:]
    )
    data = table(whole)
    assert (len(data.train_labels), len(data.test_labels), len(data.ood_inputs)) == (16, 4, 3)
    assert (np.bincount(data.train_labels) == 4).all()
    together = np.concatenate([data.train_inputs, data.test_inputs])
    np.testing.assert_array_equal(together[np.argsort(together[:, 0])], X)
    assert len(table(whole, train_size=8).train_labels) == 8
    given = table(parts)
    np.testing.assert_array_equal(given.train_inputs, X[:12])
    np.testing.assert_array_equal(given.test_labels, Y[12:])
    np.savez(parts, inputs=X, labels=Y - 2)
    targets = table(parts, task="regression")
    assert targets.is_regression
    values = np.concatenate([targets.train_labels, targets.test_labels])
    np.testing.assert_allclose(
        np.sort(values * targets.target_scale + targets.target_mean), np.sort(Y - 2), atol=1e-6
    )
    np.savez(parts, inputs=X.astype(np.uint8), labels=Y * 1.0)
    assert table(parts).is_regression
    assert table(parts, task="classification").num_classes == 4
    assert (table(parts, task="classification", label_noise=0.25).train_labels < 4).all()


def test_out_of_distribution_inputs_come_from_a_second_npz(tmp_path):
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(path, inputs=X, labels=Y)
    np.savez(other, inputs=X[:7] + 100)
    data = table(path, ood_path=other)
    np.testing.assert_array_equal(data.ood_inputs, X[:7] + 100)
    assert data.ood_name == "the inputs given"
    for task, ood_path, message in (
        ("regression", other, "ood_inputs are for classification"),
        (None, tmp_path / "b.csv", r"ood \(--ood\) must be an \.npz, as .*a\.npz is, got .*b\.csv"),
    ):
        with pytest.raises(DataError, match=message):
            table(path, task=task, ood_path=ood_path)
    np.savez(other, inputs=X[:, :1])
    with pytest.raises(DataError, match=r"ood_inputs must have examples of shape \(2,\)"):
        table(path, ood_path=other)
    np.savez(other, others=X)
    with pytest.raises(DataError, match=r"b\.npz must hold an array 'inputs', got others"):
        table(path, ood_path=other)


def test_classes_of_a_split_keep_their_share_and_seeds_differ(tmp_path):
    path = tmp_path / "a.npz"
    labels = np.repeat([False, True], [10, 30])
    np.savez(path, inputs=np.arange(80.0).reshape(40, 2), labels=labels)
    for seed in range(10):
        data = table(path, train_size=20, seed=seed)
        np.testing.assert_array_equal(np.bincount(data.train_labels), [5, 15])
    other = table(path, train_size=20, seed=1)
    assert {*data.train_inputs[:, 0]} != {*other.train_inputs[:, 0]}
    with pytest.raises(DataError, match="seed must not be negative, got -1"):
        table(path, seed=-1)


def test_tables_are_read_with_any_delimiter_with_names_and_with_words(tmp_path):
    rows = "\n".join(
        f"{i},{'red' if i % 2 else 'blue'},{5},{'yes' if i % 3 else 'no'}" for i in range(20)
    )
    path = write(tmp_path / "t.csv", "size,colour,same,answer\n" + rows)
    data = table(path, target="answer")
    assert data.num_classes == 2
    assert data.train_inputs.shape == (16, 4)
    np.testing.assert_allclose(data.train_inputs[:, :3].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(data.train_inputs[:, :3].std(0), 1, rtol=1e-6)
    np.testing.assert_array_equal(data.train_inputs[:, 3], 0)
    spaced = write(tmp_path / "t.txt", "\n".join(f"{i} {i * i / 7} {i % 2}" for i in range(20)))
    assert table(spaced, target="2").num_classes == 2
    marks = write(tmp_path / "m.csv", "x,y\n" + "\n".join(f"{i % 2}_0,{i % 2}" for i in range(20)))
    assert table(marks, target="y").train_inputs.shape == (16, 2)
    assert table(spaced, target="1").is_regression
    by_number = table(path, target="3")
    np.testing.assert_array_equal(by_number.train_labels, data.train_labels)
    assert table(spaced, target="2", task="regression").is_regression
    semicolons = write(tmp_path / "s.csv", path.read_text().replace(",", ";"))
    np.testing.assert_array_equal(
        table(semicolons, target="answer").train_inputs, data.train_inputs
    )


def test_a_column_that_is_constant_in_training_becomes_zero(tmp_path):
    # The mean of these differs from each by rounding, and so does the standard deviation from 0.
    assert np.full((100, 2), 0.1).std(0).min() > 0
    rows = "".join(f"0.1,{i},{i % 2}\n" for i in range(100))
    train = write(tmp_path / "a.csv", "c,x,y\n" + rows)
    test = write(tmp_path / "b.csv", "c,x,y\n0.1,3,0\n1.1,3,1\n")
    data = table(train, target="y", test_path=test)
    np.testing.assert_array_equal(data.train_inputs[:, 0], 0)
    np.testing.assert_allclose(data.test_inputs[:, 0], [0, 1], rtol=1e-6)


def test_words_of_the_target_are_classes_in_their_order(tmp_path):
    words = ["pear", "apple", "fig"]
    train = "x,kind\n" + "\n".join(f"{i},{words[i % 3]}" for i in range(12))
    path = write(tmp_path / "a.csv", train)
    test = write(tmp_path / "b.csv", "x,kind\n1,fig\n2,apple\n")
    data = table(path, target="kind", test_path=test)
    assert data.num_classes == 3
    np.testing.assert_array_equal(data.train_labels, np.resize([2, 0, 1], 12))
    np.testing.assert_array_equal(data.test_labels, [1, 0])
    numbered = write(tmp_path / "c.csv", train.replace("pear", "7").replace("fig", "-1"))
    assert table(numbered, target="kind").num_classes == 3
    # Whole numbers need not begin at 0 nor follow each other.
    sparse = write(
        tmp_path / "d.csv", "x,y\n" + "\n".join(f"{i},{10 ** (i % 3)}" for i in range(12))
    )
    np.testing.assert_array_equal(
        table(sparse, target="y", test_path=sparse).test_labels, np.resize([0, 1, 2], 12)
    )
    more = write(tmp_path / "e.csv", "x,y\n" + "\n".join(f"{i},{i}" for i in range(101)))
    assert table(more, target="y").is_regression
    classes = table(more, target="y", test_path=more, task="classification")
    assert classes.num_classes == 101
    with pytest.raises(DataError, match="has the class 'plum' in the test examples"):
        table(path, target="kind", test_path=write(tmp_path / "f.csv", "x,kind\n1,plum\n2,fig\n"))
    with pytest.raises(DataError, match="has the class 5 in the test examples"):
        table(sparse, target="y", test_path=write(tmp_path / "g.csv", "x,y\n1,5\n2,10\n"))


def test_numbers_in_one_table_must_be_numbers_in_the_others(tmp_path):
    path = write(tmp_path / "a.csv", GOOD)
    other = write(tmp_path / "b.csv", "x,y\nbig,0\n2,1\n")
    with pytest.raises(DataError, match=r"column 'x' of .*b\.csv must be numbers, as it is in"):
        table(path, target="y", test_path=other)
    with pytest.raises(DataError, match=r"must be a table, as .*a\.csv is, got .*b\.npz"):
        table(path, target="y", ood_path=tmp_path / "b.npz")


def test_a_second_table_holds_the_test_examples(tmp_path):
    train = write(tmp_path / "a.csv", "x,y\n" + "\n".join(f"{i},{i % 2}" for i in range(10)))
    test = write(tmp_path / "b.csv", "y,x\n1,20\n0,30\n")
    data = table(train, target="y", test_path=test, ood_path=test)
    assert len(data.train_labels) == 10
    mean, scale = np.arange(10).mean(), np.arange(10).std()
    np.testing.assert_allclose(
        data.test_inputs[:, 0], (np.array([20, 30]) - mean) / scale, rtol=1e-6
    )
    np.testing.assert_array_equal(data.test_labels, [1, 0])
    np.testing.assert_array_equal(data.ood_inputs, data.test_inputs)


COLOURS = "x,y\n" + "1,red\n2,blue\n" * 5
GOOD = "x,y\n" + "\n".join(f"{i},{i % 2}" for i in range(10))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (GOOD, {}, "must name the column .* one of x, y; none was given"),
        (GOOD, {"target": "z"}, "one of x, y; got 'z'"),
        (GOOD.replace("3,", ","), {"target": "y"}, "missing value in column 'x', example 4"),
        (GOOD.replace("3,", "NA,"), {"target": "y"}, "missing value in column 'x', example 4"),
        (GOOD + "\n1,2,3", {"target": "y"}, "2 columns in every row, got 3 in row 12"),
        ("x,x\n1,2\n3,4", {"target": "x"}, "different name for each column"),
        ("x", {"target": "x"}, "a row for each example, got no examples"),
        (" \n\n", {"target": "x"}, "a row for each example, got no examples"),
        ('1,"2\n"', {"target": "0"}, "a row for each example, got no examples"),
        (GOOD, {"target": "y", "train_size": 10}, r"train_size .* must lie in \[2, 9\], got 10"),
        (GOOD, {"target": "x", "task": "regression", "label_noise": 0.1}, "for classification"),
        (GOOD.replace("3,1", "3,1.5"), {"target": "y", "task": "classification"}, "whole numbers"),
        (GOOD.replace("3,1", "3,yes"), {"target": "y", "task": "regression"}, "numbers for"),
        (GOOD, {"target": "2"}, "or give its index from 0: one of x, y; got '2'"),
        ("x,y\n1,2", {"target": "y"}, "examples to train on and to test on, got one in all"),
        ("y\n1\n0\n1", {"target": "y"}, "must have columns beside 'y'"),
        ("x;y\n1,5;0\n2,5;1", {"target": "y"}, "numbers with a comma in column 'x'"),
        ("x,y\n1,inf\n2,3\n", {"target": "y"}, "column 'y' of .* must be finite, but 1 of 2"),
        ('x,y\n1,"2\n3,4', {"target": "y"}, r"cannot be read as a table \(.*EOF inside string"),
        ("x,y\n1,2,\n3,4,", {"target": "y"}, "2 columns in every row, got 3 in row 2"),
        ("# a, b\n1,2,3\n4,5,6", {"target": "y"}, "row 2; delete the first row if it is a comment"),
        ("# a, b\nx;y\n1;0", {"target": "y"}, "got 'y'; delete the first row if it is a comment"),
        ("x,y,\n1,2,\n3,4,", {"target": "y"}, "name for each column, got a column without a name"),
        (GOOD.replace("3,1", "3"), {"target": "y"}, "missing value in column 'y', example 4"),
        (COLOURS + "3,re", {"target": "y"}, "cut short: it ends with 're', the beginning of 'red'"),
        ("x;y\n1,234.5;0\n7,002;1", {"target": "y"}, "numbers with a comma in column 'x'"),
        (
            "x,y\n" + "\n".join(f"{i},word{i}" for i in range(101)),
            {"target": "y"},
            "at most 100 different words, got 101.*--task classification",
        ),
        (
            "x,y\n" + "\n".join(f"word{i},{i % 2}" for i in range(60)),
            {"target": "y"},
            "numbers or at most 50 different words, got 60",
        ),
    ],
)  # fmt: skip
def test_tables_with_mistakes_are_refused(tmp_path, text, options, message):
    with pytest.raises(DataError, match=message):
        table(write(tmp_path / "t.csv", text), **options)


@pytest.mark.parametrize("end", ["3,red", "3,re\n", "3,re\n4,re", "3,green"])
def test_a_last_word_that_is_no_cut_one_is_read(tmp_path, end):
    data = table(write(tmp_path / "t.csv", COLOURS + end), target="y", seed=1)
    assert data.num_classes == 2 + (end != "3,red")


def numbers_with(*words, column=0):
    """A table of 40 different numbers, with words in place of some in one column."""
    rows = [[str(i / 7), str(i / 3)] for i in range(40)]
    for row, word in enumerate(words, 4):
        rows[row][column] = word
    return "x,y\n" + "\n".join(",".join(row) for row in rows)


@pytest.mark.parametrize("word", ["-", ".", "missing", "#N/A", "<NA>", "about 3"])
@pytest.mark.parametrize("column", ["x", "y"])
@pytest.mark.parametrize("task", [None, "regression"])
def test_a_word_in_a_column_of_numbers_is_named_with_its_column_and_row(
    tmp_path, word, column, task
):
    path = write(tmp_path / "t.csv", numbers_with(word, column="xy".index(column)))
    with pytest.raises(DataError, match=rf"column '{column}' .*numbers.* '{word}' in example 5"):
        table(path, target="y", task=task)


def test_a_few_placeholders_beside_many_words_or_numbers_are_refused(tmp_path):
    mixed = "\n".join(f"{'abc1-'[i % 5]},{i}" for i in range(20))
    with pytest.raises(DataError, match=r"column 'x' .* 4 of 20 .* numbers.* '-' in example 5"):
        table(write(tmp_path / "a.csv", "x,y\n" + mixed), target="y", task="regression")
    classes = "\n".join(f"{i},{'01-'[i % 3]}" for i in range(21))
    for task in (None, "classification"):
        with pytest.raises(
            DataError, match=r"column 'y' .* 14 of 21 .* numbers.* '-' in example 3"
        ):
            table(write(tmp_path / "b.csv", "x,y\n" + classes), target="y", task=task)


def test_words_beside_fewer_numbers_are_categories_and_so_is_a_dash_beside_a_plus(tmp_path):
    rows = "\n".join(f"{'123x'[i % 4]},{'+-'[i % 2]},{i % 2}" for i in range(20))
    path = write(tmp_path / "t.csv", "rooms,sign,y\n" + rows)
    assert table(path, target="y").train_inputs.shape == (16, 6)
    assert table(path, target="sign").num_classes == 2


def test_numbers_with_a_word_are_classes_if_the_task_says_so(tmp_path):
    rows = "\n".join(f"{i},{'012345678X'[i % 10]}" for i in range(40))
    path = write(tmp_path / "t.csv", "x,y\n" + rows)
    with pytest.raises(DataError, match=r"if these are classes, say so .--task classification"):
        table(path, target="y")
    assert table(path, target="y", task="classification").num_classes == 10


def test_a_word_in_the_test_table_is_named_with_its_row(tmp_path):
    path = write(tmp_path / "a.csv", numbers_with())
    other = write(tmp_path / "b.csv", numbers_with("-"))
    with pytest.raises(DataError, match=r"'x' of .*b\.csv must be numbers.* '-' in example 5"):
        table(path, target="y", test_path=other)
    other = write(tmp_path / "b.csv", numbers_with("-", column=1))
    with pytest.raises(DataError, match=r"'y' of .*b\.csv must hold numbers.* '-' in example 5"):
        table(path, target="y", test_path=other)


def test_a_test_table_may_hold_categories_that_the_training_table_lacks(tmp_path):
    path = write(
        tmp_path / "a.csv", "x,y\n" + "\n".join(f"{'ac'[i % 2]},{i % 2}" for i in range(8))
    )
    other = write(tmp_path / "b.csv", "x,y\nb,0\nc,1\n")
    data = table(path, target="y", test_path=other)
    np.testing.assert_array_equal(data.train_inputs, [[1, 0, -1], [-1, 0, 1]] * 4)
    np.testing.assert_array_equal(data.test_inputs, [[-1, 1, -1], [-1, 0, 1]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("5.1,3.5,setosa\n4.9,3.0,setosa\n7.0,3.2,virginica", "'setosa' .* again, in row 2"),
        ("red,1,yes\nblue,2,no\nred,3,no", "'red' .* again, in row 3"),
        ("2,0,1\n1,5,red\n2,6,blue\n3,7,red", "below '1' column 2 holds words such as 'red'"),
        ("2,?,1\n1,5,0\n2,6,1\n3,7,1", "its cell '.' is a missing value"),
        ("0,1,2\n1.5,5,1\n2.5,6,0\n3.5,7,0", "counts the columns"),
    ],
)
def test_a_table_without_column_names_is_refused_where_an_example_would_be_lost(
    tmp_path, rows, message
):
    with pytest.raises(DataError, match=f"first row of .*{message}"):
        table(write(tmp_path / "t.csv", rows), target="2", task="classification")


def test_columns_named_by_whole_numbers_may_hold_their_name(tmp_path):
    rows = "\n".join(f"{i % 2},{1 - i % 2},{i}" for i in range(20))
    path = write(tmp_path / "t.csv", "0,1,y\n" + rows)
    assert len(table(path, target="y", task="regression").train_labels) == 16


@pytest.mark.parametrize("scale", ["e200", "e-200"])
@pytest.mark.parametrize("column", ["x", "y"])
def test_columns_whose_variance_no_float_can_hold_are_refused(tmp_path, scale, column):
    rows = "\n".join(f"{i}{scale},{i}" if column == "x" else f"{i},{i}{scale}" for i in range(20))
    with pytest.raises(DataError, match=f"column '{column}' .*must have a variance that float64"):
        table(write(tmp_path / "t.csv", "x,y\n" + rows), target="y", task="regression")


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_targets_whose_variance_no_float_can_hold_are_refused(scale):
    with pytest.raises(DataError, match="labels must have a variance that float64 can hold"):
        from_arrays("a", X, Y * scale, X, Y * scale)


def test_inputs_beyond_float32_are_refused():
    with pytest.raises(DataError, match=r"inputs must lie within 3\.4e\+38 of 0.*got 3\.9e\+201"):
        from_arrays("a", np.where(X == 39, 39e200, X), Y, X, Y)


def test_masked_values_are_refused():
    masked = np.ma.masked_equal(X, 7)
    with pytest.raises(DataError, match="inputs must hold a value everywhere, but 1 are masked"):
        from_arrays("a", masked, Y, X, Y)
    with pytest.raises(DataError, match=r"test_labels must hold a value .* 5 are masked"):
        from_arrays("a", X, Y, X, np.ma.masked_equal(Y, 3))


def test_messages_list_at_most_ten_columns_and_print_no_escapes(tmp_path):
    names = [f"column{i}" for i in range(1000)]
    rows = "\n".join(",".join(map(str, range(i, 1000 + i))) for i in range(3))
    wide = write(tmp_path / "a.csv", ",".join(["\x1b[31m", *names[1:]]) + "\n" + rows)
    for options in (
        {"target": "y"},
        {"target": "999", "test_path": write(tmp_path / "b.csv", GOOD)},
    ):
        with pytest.raises(
            DataError, match=r"x1b\[31m, column1, .*column9 and 9\d\d more"
        ) as raised:
            table(wide, **options)
        assert len(str(raised.value)) < 600
        assert str(raised.value).isprintable()


def test_a_class_without_training_examples_is_named_by_its_word(tmp_path):
    words = ["pear"] * 9 + ["apple"] * 9 + ["fig"] * 2
    rows = "\n".join(f"{i},{word}" for i, word in enumerate(words))
    path = write(tmp_path / "t.csv", "x,y\n" + rows)
    with pytest.raises(DataError, match="of every class, but class 'fig' has none"):
        table(path, target="y", train_size=4)


def test_a_delimiter_inside_quotes_is_not_taken_for_that_of_the_table(tmp_path):
    rows = "\n".join(f"{i};{i % 2}" for i in range(20))
    path = write(tmp_path / "t.csv", '"size, in cm, or m";y\n' + rows)
    assert table(path, target="y").num_classes == 2


def test_cells_are_read_as_they_are_written(tmp_path):
    rows = "\n".join(f'"a, {i % 2}", {i % 3}e1 ,{i % 2}' for i in range(21))
    path = tmp_path / "t.csv"
    path.write_bytes(("\ufeffword,size,y\r\n\r\n" + rows.replace("\n", "\r\n")).encode())
    data = table(path, target="y", test_path=path)
    assert data.train_inputs.shape == (21, 3)
    np.testing.assert_allclose(
        data.train_inputs[:, 2], np.resize([-1, 0, 1], 21) * 1.5**0.5, rtol=1e-6
    )


def test_columns_are_standardised_in_float64(tmp_path):
    values = 1e9 + np.arange(20) / 64
    rows = "\n".join(f"{value},{i % 2}" for i, value in enumerate(values))
    path = write(tmp_path / "t.csv", "x,y\n" + rows)
    data = table(path, target="y", test_path=path)
    expected = ((values - values.mean()) / values.std()).astype(np.float32)
    np.testing.assert_array_equal(data.train_inputs[:, 0], expected)


def test_a_file_whose_name_is_not_utf_8_gives_a_name_that_a_report_can_hold(tmp_path):
    path = write(tmp_path / os.fsdecode(b"caf\xe9.csv"), GOOD)
    assert table(path, target="y").name == "caf?"


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv does not exist"):
        table(tmp_path / "nowhere.csv", target="y")
    with pytest.raises(DataError, match=r"nowhere\.npz cannot be read: there is no such file"):
        table(tmp_path / "nowhere.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DataError, match=r"folder\.npz cannot be read \(Is a directory\); give"):
        table(tmp_path / "folder.npz")
    path = tmp_path / "a.npz"
    np.savez(path, inputs=X, other=Y)
    with pytest.raises(DataError, match="must hold an array 'labels', got inputs, other"):
        table(path)
    with pytest.raises(DataError, match="--target and --test-file are for tables"):
        table(path, target="y")
    np.savez(path, train_inputs=X, train_labels=Y, test_inputs=X)
    with pytest.raises(DataError, match="must hold an array 'test_labels'"):
        table(path)
    np.savez(path, train_inputs=X, train_labels=Y, test_inputs=X, test_labels=Y[1:])
    with pytest.raises(DataError, match="test_labels must hold one number for each of the 20"):
        table(path)
    np.savez(path, inputs=X, labels=Y + 0.5)
    with pytest.raises(DataError, match=r"labels must be whole numbers to be classes, got 0\.5"):
        table(path, task="classification")
    np.savez(path, inputs=X * 1j, labels=Y)
    with pytest.raises(DataError, match="inputs must be numbers, got the dtype complex128"):
        table(path)
    with path.open("wb") as file:
        np.save(file, X)
    with pytest.raises(DataError, match=r"an \.npz of several arrays, got a single one"):
        table(path)
    np.savez_compressed(path, inputs=X, labels=Y)
    damaged = bytearray(path.read_bytes())
    # The compression method, in the archive's first header and its directory.
    damaged[8] = damaged[damaged.index(b"PK\1\2") + 10] = 99
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"cannot be read as an \.npz of numbers"):
        table(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cannot be read as an \.npz"):
        table(path)
    np.savez(path, inputs=X, labels=np.array([{}] * 20))
    with pytest.raises(DataError, match="without objects"):
        table(path)
    other = write(tmp_path / "b.csv", "z\n1\n2")
    with pytest.raises(DataError, match="must have the columns of"):
        table(write(tmp_path / "c.csv", GOOD), target="y", test_path=other)


def test_subsets_are_nested_and_noise_is_exact():
    data = from_arrays("a", X, Y, X, Y)
    small, large = subset(data, 8, 0), subset(data, 12, 0)
    assert (large | ~small).all()
    assert (np.bincount(data.train_on(small).train_labels) == 2).all()
    noisy = with_label_noise(data, 0.25, 0)
    assert (noisy.train_labels != data.train_labels).sum() == 5
    assert noisy.label_noise == 0.25
    with pytest.raises(DataError, match="25% of the labels are made wrong already"):
        with_label_noise(noisy, 0.5, 0)
    with pytest.raises(DataError, match=r"train_size must lie in \[1, 20\]"):
        subset(data, 21, 0)


def log_probs(*shape):
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


PREDICTIONS = {
    "labels": np.arange(6) % 3,
    "plain": log_probs(4, 6, 3),
    "dropout": log_probs(2, 6, 3),
    "monte_carlo": log_probs(5, 6, 3),
}


def test_predictions_are_read(tmp_path):
    path = tmp_path / "p.npz"
    np.savez(path, **PREDICTIONS)
    predictions = load_predictions(path)
    assert {name: array.shape for name, array in predictions.log_probs.items()} == {
        "plain": (4, 6, 3),
        "dropout": (2, 6, 3),
        "monte_carlo": (1, 5, 6, 3),
    }
    np.testing.assert_array_equal(predictions.labels, PREDICTIONS["labels"])
    np.testing.assert_array_equal(predictions.log_probs["plain"], PREDICTIONS["plain"])
    # A class may be ruled out, and nothing is normalised again.
    certain = np.log(np.eye(3), where=np.eye(3) > 0, out=np.full((3, 3), -1e300))
    mine = np.broadcast_to(certain[PREDICTIONS["labels"]], (2, 6, 3))
    np.savez(path, **PREDICTIONS, mine=mine)
    read = load_predictions(path).log_probs["mine"]
    np.testing.assert_array_equal(read, np.where(mine < 0, -np.inf, 0))
    assert read.dtype == np.float32


def ruled_out(members):
    """Predictions of which one gives the right class of an example no probability."""
    array = np.array(members)
    array[1, 4] = np.where(np.arange(3) == (PREDICTIONS["labels"][4] + 1) % 3, 0, -np.inf)
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": ruled_out(PREDICTIONS["dropout"])}, r"first in \[1\] .* at example 4"),
        ({"plain": None}, "must hold an array 'plain'"),
        ({"labels": np.zeros((6, 1), int)}, r"labels .* must be integers \[example\]"),
        ({"labels": np.full(6, 3)}, r"labels .* must lie in \[0, 3\)"),
        ({"labels": np.zeros(5, int)}, "with the 5 examples of labels"),
        ({"dropout": log_probs(6, 3)}, r"dropout .* must be \[member, example, class\]"),
        ({"dropout": log_probs(2, 6, 4)}, "the classes of plain"),
        ({"dropout": np.exp(log_probs(2, 6, 3))}, "these are probabilities, take their logarithm"),
        ({"dropout": 3 * log_probs(2, 6, 3)}, "take `log_softmax` of logits"),
        ({"dropout": np.full((2, 6, 3), np.nan)}, "36 are NaN"),
        ({"dropout": np.zeros((2, 6, 3), int)}, "must be log-probabilities, floats"),
        ({"dropout": np.full((2, 6, 3), np.inf)}, "they sum to"),
        ({"plain": log_probs(4, 6, 1)}, "at least 2 classes, got 1"),
        ({"monte_carlo": log_probs(6, 3)}, r"must be \[network, mask, example, class\]"),
        ({"plain": log_probs(3, 6, 3)}, "at least 4 networks"),
        ({"dropout": None, "monte_carlo": None}, "something to compare with plain"),
        ({"=cmd|x": log_probs(2, 6, 3)}, "must begin with a letter or a digit, got '=cmd|x'"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(tmp_path, changes, message):
    arrays = {k: v for k, v in {**PREDICTIONS, **changes}.items() if v is not None}
    path = tmp_path / "p.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        load_predictions(path)
