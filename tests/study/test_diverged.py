"""Networks that diverged: who is marked, who moves up, and what averages are made of."""

import numpy as np
import pytest

from jdrop.study.diverged import (
    DivergedError,
    check_some_are_left,
    mark_diverged,
    members_left,
    num_diverged,
    num_left,
)
from jdrop.study.tuning import WORST, average_losses

REPLICATES = 2


def variables():
    """Three members of two replicates; member `i` of replicate `r` is 10 r + i."""
    names = np.array([0.0, 10.0, 1.0, 11.0, 2.0, 12.0])
    return {"w": np.stack([names, names], 1), "count": names.astype(np.int32)}


def test_nothing_changes_where_no_network_diverged():
    given = variables()
    assert mark_diverged(given, [], REPLICATES, in_order=False) is given


def test_networks_that_are_left_move_up_within_their_replicate():
    marked = mark_diverged(variables(), [0, 3], REPLICATES, in_order=False)
    assert marked["count"].tolist() == [1, 10, 2, 12, 0, 11]
    np.testing.assert_array_equal(marked["w"][:, 0], [1, 10, 2, 12, np.nan, np.nan])
    assert np.isfinite(variables()["w"]).all()


def test_networks_with_settings_of_their_own_stay_in_place():
    marked = mark_diverged(variables(), [0, 3], REPLICATES, in_order=True)
    assert marked["count"].tolist() == [0, 10, 1, 11, 2, 12]
    np.testing.assert_array_equal(marked["w"][:, 0], [np.nan, 10, 1, np.nan, 2, 12])


@pytest.mark.parametrize("diverged", [[], [0], [0, 2, 1, 5]])
def test_a_replicate_with_a_network_left_is_fine(diverged):
    check_some_are_left(diverged, 6, REPLICATES, "networks")


def test_a_replicate_without_networks_is_told():
    with pytest.raises(DivergedError, match="3 of 6 plain networks have losses"):
        check_some_are_left([0, 2, 4], 6, REPLICATES, "plain networks")


def test_averages_are_of_members_that_are_left():
    outputs = np.arange(24.0).reshape(2, 3, 4)
    ood = -outputs
    outputs[0, 1, 2] = np.nan
    assert num_diverged(outputs) == 1
    assert num_left(outputs) == 2
    np.testing.assert_array_equal(members_left(outputs, 2)[0], outputs[0, [0, 2]])
    np.testing.assert_array_equal(members_left(outputs, 2)[1], outputs[1, :2])
    np.testing.assert_array_equal(members_left(outputs, 2, ood)[0], ood[0, [0, 2]])


def test_cross_validation_keeps_networks_that_diverged_out():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 8, 4))
    outputs = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    labels, left_out = rng.integers(0, 4, 8), [np.arange(4), np.arange(4, 8)]
    whole = average_losses(outputs, labels, left_out)
    outputs[0, 1] = np.nan
    one, two, three = average_losses(outputs, labels, left_out)
    others = average_losses(outputs[:, [2, 0]], labels, left_out)
    second = average_losses(outputs[1:], labels, left_out[1:])
    assert three == pytest.approx(second[2])
    replicate_one = average_losses(outputs[:1, [2, 0]], labels, left_out[:1])
    assert one == pytest.approx((replicate_one[0] + second[0]) / 2)
    # Of three pairs of neighbours, one is without the network that diverged.
    assert two == pytest.approx((replicate_one[1] + second[1]) / 2)
    assert np.isfinite([*whole, *others]).all()
    outputs[:] = np.nan
    assert average_losses(outputs, labels, left_out) == [WORST] * 3
