"""Groups of examples that belong together, and folds that respect them."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jdrop.study.data import (
    DataError,
    fingerprint,
    folds,
    from_arrays,
    images,
    load,
    load_predictions,
    load_table,
)

# Folds.


@pytest.mark.parametrize("counts", [[40, 7, 23], [1, 1, 50], [5, 5, 5]])
def test_folds_and_their_classes_are_even_to_within_one_example(counts):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], counts))
    fold = folds(labels, None, None, 5, seed=0)
    assert fold.dtype == np.int64
    for chosen in (labels == 0, labels == 1, labels == 2, labels >= 0):
        sizes = np.bincount(fold[chosen], minlength=5)
        assert len(sizes) == 5
        assert np.ptp(sizes) <= 1


def test_folds_of_targets_are_even_and_no_function_of_the_order_or_the_targets():
    targets = np.arange(1000.0)
    fold = folds(targets, None, None, 5, seed=0)
    assert np.bincount(fold).tolist() == [200] * 5
    # The mean of 200 of 0, ..., 999 has a standard deviation of 18; a failure lies 5.5 of them off.
    for index in range(5):
        assert abs(targets[fold == index].mean() - 499.5) < 100


def test_folds_follow_from_the_seed_alone():
    labels = np.arange(50) % 3
    first, again, other = (folds(labels, None, None, 5, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_group_lies_in_one_fold_if_the_test_groups_are_others():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 400)
    labels = rng.integers(0, 3, 400)
    for test_groups in (np.array([40, 41]), None):
        fold = folds(labels, groups, test_groups, 5, seed=0)
        for group in range(40):
            assert len(np.unique(fold[groups == group])) == 1
        for label in range(3):
            share = np.bincount(fold[labels == label], minlength=5) / (labels == label).sum()
            assert np.all(np.abs(share - 0.2) < 0.05), share


def test_a_group_is_divided_if_a_test_group_has_training_examples():
    groups, labels = np.repeat(np.arange(10), 20), np.arange(200) % 2
    fold = folds(labels, groups, np.array([9, 10]), 5, seed=0)
    np.testing.assert_array_equal(fold, folds(labels, None, None, 5, seed=0))


def test_no_fold_is_empty_beside_one_large_group():
    groups = np.repeat(np.arange(5), [1000, 1, 1, 1, 1])
    labels = np.where(groups == 0, np.arange(1004) % 2, 0)
    fold = folds(labels, groups, None, 5, seed=0)
    assert sorted(np.bincount(fold).tolist()) == [1, 1, 1, 1, 1000]


def test_there_are_no_more_folds_than_groups_or_examples():
    assert np.unique(folds(np.arange(12) % 2, np.arange(12) % 3, None, 5, seed=0)).size == 3
    assert np.unique(folds(np.arange(4) % 2, None, None, 5, seed=0)).size == 4


def test_a_single_group_is_divided_by_example():
    fold = folds(np.arange(20) % 2, np.zeros(20, int), np.ones(3, int), 5, seed=0)
    assert np.bincount(fold).tolist() == [4] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.arange(4), None, None, 1, 0), "num_folds must be at least 2, got 1"),
        ((np.arange(1), None, None, 5, 0), "at least 2 training examples, got 1"),
        ((np.arange(4), np.arange(3), None, 5, 0), r"each of the 4 labels, got the shape \(3,\)"),
        ((np.arange(4), None, None, 5, -1), "seed must not be negative"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        folds(*arguments)


# Groups of arrays, files and tables.

X = np.arange(40.0).reshape(20, 2)
Y = np.arange(20) % 2


def arrays(groups=None, test_groups=None):
    return from_arrays("a", X, Y, X[:6], Y[:6], None, groups, test_groups)


@pytest.mark.parametrize("as_type", [np.array, list, lambda groups: np.array(groups, object)])
def test_equal_groups_of_training_and_test_get_equal_numbers(as_type):
    data = arrays(as_type(["b", "d"] * 10), as_type(["a", "b", "c"] * 2))
    assert data.group_name == "group"
    assert (data.train_groups.dtype, data.test_groups.dtype) == (np.int32, np.int32)
    assert data.train_groups.tolist() == [1, 3] * 10
    assert data.train_group_name == data.group_name == "group"
    assert data.test_groups.tolist() == [0, 1, 2] * 2
    chosen = data.train_on(np.array([1, 2, 5]))
    assert chosen.train_groups.tolist() == [3, 1, 3]
    assert chosen.test_groups.tolist() == [0, 1, 2] * 2


def test_groups_of_the_test_examples_suffice():
    data = arrays(test_groups=[7, 7, 9, 9, 9, 7])
    assert data.train_groups is None
    assert (data.group_name, data.train_group_name) == ("group", None)
    assert data.test_groups.tolist() == [0, 0, 1, 1, 1, 0]
    assert data.train_on(np.arange(3)).train_groups is None


def test_data_without_groups_is_taken_as_independent():
    data = arrays()
    assert (data.group_name, data.train_groups, data.test_groups) == (None, None, None)


def test_groups_are_a_part_of_the_identity():
    groups, test_groups = np.arange(20) % 4, np.arange(6) % 3
    datasets = [
        arrays(),
        arrays(None, test_groups),
        arrays(groups, test_groups),
        arrays(groups, test_groups[::-1]),
        arrays(groups[::-1], test_groups),
        replace(arrays(groups, test_groups), group_name="patient"),
    ]
    assert len({fingerprint(data) for data in datasets}) == len(datasets)
    assert fingerprint(arrays(groups + 5, test_groups + 5)) == fingerprint(datasets[2])


@pytest.mark.parametrize(
    ("groups", "test_groups", "message"),
    [
        (Y, None, "test_groups must be given beside groups"),
        (Y[:5], Y[:6], "^groups must hold one group for each of the 20 examples, got 5"),
        (Y, Y[:5], "^test_groups must hold one group for each of the 6 examples, got 5"),
        (Y, [3] * 6, "at least 2 groups, .* but all are of the group 3;"),
        (Y * 1.0, Y[:6], "^groups must be integers or text .*, got the dtype float64"),
        (Y, [None, "a"] * 3, "^test_groups must be integers or text .*, got the dtype object"),
        (Y[:, None], Y[:6], r"^groups must be integers or text .* the shape \(20, 1\)"),
        (Y, ["a", "b"] * 3, "must both be integers or both text, got int64 and <U1"),
        (np.ma.array(Y, mask=Y == 1), Y[:6], "^groups must hold .*, but 10 are masked"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, test_groups, message):
    with pytest.raises(DataError, match=message):
        arrays(groups, test_groups)


OPTIONS = {
    "target": None, "task": None, "test_path": None, "train_size": None, "label_noise": 0.0,
    "seed": 0, "ood_path": None,
}  # fmt: skip


def from_file(path, groups, **options):
    return load_table(path, **{**OPTIONS, **options}, groups=groups)


def write_table(path, people, first=0):
    """Rows whose value is their number, and whose class is the group's last letter."""
    rows = [f"{first + i},{person},{i % 2}" for i, person in enumerate(people)]
    path.write_text("\n".join(["value,person,label", *rows]) + "\n")
    return path


PEOPLE = ["ann", "bob", "eve", "joe", "kim"] * 8


@pytest.mark.parametrize("column", ["person", "1"])
def test_a_column_of_a_table_tells_the_groups_and_is_no_feature(tmp_path, column):
    path = write_table(tmp_path / "a.csv", PEOPLE)
    data = from_file(path, column, target="label", train_size=25)
    plain = from_file(path, None, target="label", train_size=25)
    assert data.group_name == "person"
    assert data.train_inputs.shape == (25, 1)
    assert plain.train_inputs.shape == (25, 6)
    # The column of values, standardised, tells which row an example was.
    values = np.concatenate([data.train_inputs, data.test_inputs])[:, 0]
    rows = np.argsort(np.argsort(values))
    groups = np.concatenate([data.train_groups, data.test_groups])
    np.testing.assert_array_equal(groups, rows % 5)
    np.testing.assert_array_equal(data.train_labels, plain.train_labels)


def test_a_table_of_test_examples_has_groups_too(tmp_path):
    path = write_table(tmp_path / "a.csv", PEOPLE)
    test_path = write_table(tmp_path / "b.csv", ["zoe", "bob"] * 3)
    data = from_file(path, "person", target="label", test_path=test_path, train_size=20)
    assert set(data.train_groups.tolist()) == {0, 1, 2, 3, 4}
    assert data.test_groups.tolist() == [5, 1] * 3
    without = tmp_path / "c.csv"
    without.write_text("value,label\n1,0\n2,1\n")
    with pytest.raises(DataError, match=r"c\.csv must have the columns of .*lacks person"):
        from_file(path, "person", target="label", test_path=without)


def test_out_of_distribution_rows_need_no_groups(tmp_path):
    path = write_table(tmp_path / "a.csv", PEOPLE)
    (tmp_path / "ood.csv").write_text("value\n100\n200\n")
    data = from_file(path, "person", target="label", ood_path=tmp_path / "ood.csv")
    assert data.ood_inputs.shape == (2, 1)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("persons", "must name a column of .*, one of value, person, label, or a file .*'persons'"),
        ("label", "another column of .* than the target 'label'"),
        ("9", "must name a column .*; got '9'"),
    ],
)
def test_a_column_that_tells_no_groups_is_refused(tmp_path, groups, message):
    path = write_table(tmp_path / "a.csv", PEOPLE)
    with pytest.raises(DataError, match=message):
        from_file(path, groups, target="label")


def test_a_group_is_missing_in_a_table(tmp_path):
    path = write_table(tmp_path / "a.csv", ["ann", "bob", "", *PEOPLE])
    with pytest.raises(DataError, match="missing value in column 'person', example 3"):
        from_file(path, "person", target="label")


def test_a_table_of_target_and_groups_alone_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("person,label\nann,1\nbob,0\n")
    with pytest.raises(DataError, match="must have columns beside 'label' and 'person'"):
        from_file(tmp_path / "a.csv", "person", target="label")


@pytest.mark.parametrize("form", ["text", "numbers", "npy"])
def test_a_file_tells_the_group_of_each_example(tmp_path, form):
    names = ["c", "a", "b", "d"] * 5
    numbers = np.array([30, 10, 20, 40] * 5)
    path = tmp_path / ("g.npy" if form == "npy" else "g.txt")
    if form == "npy":
        np.save(path, numbers)
    else:
        path.write_text("\n".join(names if form == "text" else map(str, numbers)) + "\n\n")
    np.savez(tmp_path / "a.npz", inputs=X, labels=Y)
    data = from_file(tmp_path / "a.npz", str(path))
    assert (data.group_name, len(data.test_groups)) == ("group", 4)
    inputs = np.concatenate([data.train_inputs, data.test_inputs])[:, 0]
    groups = np.concatenate([data.train_groups, data.test_groups])
    expected = np.array([2, 0, 1, 3] * 5)[(inputs / 2).astype(int)]
    np.testing.assert_array_equal(groups, expected)


def test_a_file_tells_groups_of_all_examples_or_of_given_test_examples(tmp_path):
    np.savez(
        tmp_path / "a.npz", train_inputs=X, train_labels=Y, test_inputs=X[:6], test_labels=Y[:6]
    )
    everyone, tested = tmp_path / "all.txt", tmp_path / "test.txt"
    everyone.write_text("\n".join("ab" * 10 + "bc" * 3))
    tested.write_text("\n".join("bc" * 3))
    data = from_file(tmp_path / "a.npz", str(everyone), train_size=9)
    np.testing.assert_array_equal(data.train_groups, data.train_inputs[:, 0] / 2 % 2)
    assert data.test_groups.tolist() == [1, 2] * 3
    data = from_file(tmp_path / "a.npz", str(tested), train_size=9)
    assert data.train_groups is None
    assert (data.group_name, data.train_group_name) == ("group", None)
    assert data.test_groups.tolist() == [0, 1] * 3
    tested.write_text("a\n" * 7)
    with pytest.raises(DataError, match=r"each of the 26 examples \(20 to .*6 to .*, got 7"):
        from_file(tmp_path / "a.npz", str(tested))


def test_a_file_of_groups_of_a_table_leaves_its_columns_features(tmp_path):
    path, groups = write_table(tmp_path / "a.csv", PEOPLE), tmp_path / "g.txt"
    groups.write_text("\n".join(PEOPLE))
    data = from_file(path, str(groups), target="label")
    assert data.train_inputs.shape[1] == 6
    word = data.train_inputs[:, 1:].argmax(1)
    np.testing.assert_array_equal(data.train_groups, word)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\n", "a group for each of the 20 examples, got 2"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"\n\n", "one in each line, got none"),
        (b"\xff\xfe\xfd", "cannot be read"),
        (b"a\n" * 20, "at least 2 groups"),
    ],
)
def test_a_file_of_groups_that_does_not_fit_is_refused(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", inputs=X, labels=Y)
    (tmp_path / "g.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        from_file(tmp_path / "a.npz", str(tmp_path / "g.txt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, r"a text file with one label .*absent\.txt cannot be read"),
        ("g.npy", b"no array", r"g\.npy cannot be read"),
        ("g.npy", b"", r"g\.npy cannot be read"),
    ],
)
def test_a_file_of_groups_that_cannot_be_read_is_named(tmp_path, name, content, message):
    np.savez(tmp_path / "a.npz", inputs=X, labels=Y)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        from_file(tmp_path / "a.npz", str(tmp_path / name))


# Groups of predictions.


def save_predictions(path, **arrays):
    coin = np.full((4, 6, 2), np.log(0.5))
    np.savez(path, labels=Y[:6], plain=coin, dropout=coin, **arrays)
    return path


def test_predictions_may_hold_groups_which_a_file_replaces(tmp_path):
    path = save_predictions(tmp_path / "a.npz", groups=np.array(["b", "a"] * 3))
    predictions = load_predictions(path)
    assert set(predictions.log_probs) == {"plain", "dropout"}
    assert predictions.groups.tolist() == [1, 0] * 3
    (tmp_path / "g.txt").write_text("x\ny\nz\n" * 2)
    assert load_predictions(path, tmp_path / "g.txt").groups.tolist() == [0, 1, 2] * 2
    assert load_predictions(save_predictions(tmp_path / "b.npz")).groups is None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.arange(5), r"groups of .*a\.npz must hold one group for each of the 6 .*, got 5"),
        (np.arange(6) * 1.0, r"groups of .*a\.npz must be integers or text"),
        (np.zeros(6, int), "at least 2 groups"),
    ],
)
def test_groups_of_predictions_that_do_not_fit_are_refused(tmp_path, groups, message):
    with pytest.raises(DataError, match=message):
        load_predictions(save_predictions(tmp_path / "a.npz", groups=groups))


# The forms of digits.


def digits(**options):
    arguments = {"train_size": None, "label_noise": 0.0, "seed": 0, "data_dir": None}
    return load("digits", **{**arguments, **options})


def unmatched(form, template):
    """How many labels of a form are in no longest common subsequence with the template."""
    lengths = [0] * (len(template) + 1)
    for label in form:
        row = [0]
        for index, other in enumerate(template):
            row.append(max(row[-1], lengths[index + 1], lengths[index] + (label == other)))
        lengths = row
    return len(form) - lengths[-1]


def test_the_labels_of_digits_show_where_forms_begin():
    labels = load_digits().target.tolist()
    template = labels[:130]

    def total(starts):
        ends = [*starts[1:], len(labels)]
        forms = [labels[start:end] for start, end in zip(starts, ends, strict=True)]
        return sum(unmatched(form, template) for form in forms), max(map(len, forms))

    starts = list(images.FORM_STARTS)
    assert total(starts) == (1, 130)
    for index in range(1, len(starts)):
        for shift in (-1, 1):
            moved = [*starts]
            moved[index] += shift
            # One label too many for a form, or one more that does not match.
            assert total(moved) > (1, 130)


def test_digits_come_with_the_forms_of_their_writers():
    data = digits()
    assert data.group_name == "writer's form"
    published = (load_digits().data / 16).astype(np.float32)
    index_of = {row.tobytes(): index for index, row in enumerate(published)}
    for inputs, groups in (
        (data.train_inputs, data.train_groups),
        (data.test_inputs, data.test_groups),
    ):
        assert groups.dtype == np.int32
        assert len(groups) == len(inputs)
        for row, group in zip(inputs, groups, strict=True):
            index = index_of[row.tobytes()]
            starts = [*images.FORM_STARTS, 1797]
            assert starts[group] <= index < starts[group + 1]
    assert set(data.test_groups.tolist()) == set(range(14))


def test_test_digits_of_one_form_have_no_groups():
    data = digits(train_size=1796)
    assert (data.group_name, data.train_groups, data.test_groups) == (None, None, None)


def test_a_file_replaces_the_forms_of_digits(tmp_path):
    (tmp_path / "g.txt").write_text("\n".join(str(label) for label in load_digits().target))
    data = digits(groups=tmp_path / "g.txt")
    assert data.group_name == "group"
    np.testing.assert_array_equal(data.test_groups, data.test_labels)
    np.testing.assert_array_equal(data.train_groups, data.train_labels)
