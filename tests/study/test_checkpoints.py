"""Checkpoints: what is stored comes back on any devices, and damage is found and told."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdrop.study import checkpoints as checkpoints_module
from jdrop.study.checkpoints import CheckpointError
from jdrop.study.run_folder import RunFolder

MEMBERS = 3


def checkpoints_in(folder, name="plain", run_config=None):
    return RunFolder(folder, run_config or {"seed": 0}).checkpoints(name, MEMBERS)


def state_of(epochs, num_members=MEMBERS):
    """A state that tells its epoch, with more networks than are stored."""
    params = {"w": jnp.arange(2.0 * num_members).reshape(num_members, 2) + epochs}
    return {
        "params": params,
        "opt_state": optax.adam(0.1).init(params | {"steps": params["w"][:, 0]})[0].mu,
    }


def assert_equal_states(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, state, other)


def test_the_last_state_of_a_training_comes_back_whole(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    assert checkpoints.restore(state_of(0)) is None
    for epochs in (1, 2, 3):
        log = {"loss": [0.5, float("inf")], "epochs": epochs}
        checkpoints.save(epochs, state_of(epochs), log)
    epochs, restored, log = checkpoints_in(tmp_path).restore(state_of(0))
    assert (epochs, log) == (3, {"loss": [0.5, float("inf")], "epochs": 3})
    assert_equal_states(restored, state_of(3))
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "plain").iterdir()) == [
        "2",
        "3",
    ]
    checkpoints.delete()
    assert checkpoints.restore(state_of(0)) is None


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_a_checkpoint_comes_back_on_any_number_of_devices(tmp_path, num_devices):
    """Members that only fill up the devices are not stored."""
    stored, padded = state_of(1, 8), state_of(0, 4)
    checkpoints_in(tmp_path).save(1, stored, {})
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), "member")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("member"))
    _, restored, _ = checkpoints_in(tmp_path).restore(jax.device_put(padded, sharding))
    for leaf, new, old in zip(*map(jax.tree.leaves, (restored, stored, padded)), strict=True):
        assert leaf.sharding == sharding
        np.testing.assert_array_equal(leaf[:MEMBERS], new[:MEMBERS])
        np.testing.assert_array_equal(leaf[MEMBERS:], old[MEMBERS:])


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def test_no_damage_changes_a_state(tmp_path, caplog):
    """A file of the last checkpoint is damaged: the same state or the one before comes back."""
    checkpoints = checkpoints_in(tmp_path)
    folder = tmp_path / "checkpoints" / "plain"
    rng = np.random.default_rng(0)
    damages = ("gone", "empty", "cut", "flip", "flip", "flip")
    checkpoints.save(1, state_of(1), {"epochs": 1})
    found = []
    for round_, (damage, index) in enumerate(itertools.product(damages, range(4)), 2):
        checkpoints.save(round_, state_of(round_), {"epochs": round_})
        files = sorted(
            (path for path in (folder / str(round_)).rglob("*") if path.is_file()),
            key=lambda path: -path.stat().st_size,
        )
        path = files[(index + 4 * round_) % len(files)] if damage != "flip" else files[index]
        if damage == "gone":
            path.unlink()
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            flip(path, int(rng.integers(path.stat().st_size)))
        caplog.clear()
        epochs, restored, log = checkpoints.restore(state_of(0))
        assert log == {"epochs": epochs}
        assert_equal_states(restored, state_of(epochs))
        assert (epochs == round_) == ("was not used" not in caplog.text)
        found.append(epochs < round_)
        if epochs < round_:
            checkpoints.save(round_, state_of(round_), {"epochs": round_})
    assert any(found)


def test_a_changed_array_is_found_by_its_checksum(tmp_path, caplog, monkeypatch):
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(1, state_of(1), {})
    monkeypatch.setattr(checkpoints_module, "_checksum", lambda state, log: "another")
    assert checkpoints.restore(state_of(0)) is None
    assert "1 was not used: its checksum is wrong" in caplog.text


@pytest.mark.parametrize("other", [("plain", {"seed": 1}), ("dropout", {"seed": 0})])
def test_a_checkpoint_of_another_training_is_refused(tmp_path, caplog, other):
    checkpoints_in(tmp_path / "other", *other).save(1, state_of(1), {})
    checkpoints = checkpoints_in(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "other" / "checkpoints" / other[0]).rename(
        tmp_path / "run" / "checkpoints" / "plain"
    )
    assert checkpoints.restore(state_of(0)) is None
    assert "it is of another run, or of another version of jdrop" in caplog.text
    # The refused one is in nobody's way.
    checkpoints.save(1, state_of(2), {})
    assert_equal_states(checkpoints.restore(state_of(0))[1], state_of(2))


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path, caplog):
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(1, {"w": np.zeros((3, 2))}, {})
    assert checkpoints.restore({"w": np.zeros((3, 5))}) is None
    assert caplog.text.count("was not used") == 1


def test_a_deletion_that_is_killed_anywhere_leaves_no_half_checkpoint(tmp_path, caplog):
    """A kill may hit before the removal of each file; the removal itself is simulated."""
    for kept in range(0, 40, 3):
        checkpoints = checkpoints_in(tmp_path / str(kept))
        checkpoints.save(1, state_of(1), {})

        def rmtree(path, ignore_errors, kept=kept):
            for file in [file for file in sorted(path.rglob("*")) if file.is_file()][:kept]:
                file.unlink()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints_module.shutil, "rmtree", rmtree)
            checkpoints.delete()
        assert checkpoints.restore(state_of(0)) is None
        checkpoints.save(1, state_of(2), {})
        assert_equal_states(checkpoints.restore(state_of(0))[1], state_of(2))
        checkpoints.delete()
        assert not list((tmp_path / str(kept) / "checkpoints").iterdir())
    assert "was not used" not in caplog.text


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(1, state_of(1), {})

    class Full(checkpoints_module.ocp.Checkpointer):
        def save(self, path, *args, **kwargs):
            path.with_name(f"{path.name}.orbax-checkpoint-tmp").mkdir()
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nTraceback: ...")

    monkeypatch.setattr(checkpoints_module.ocp, "Checkpointer", Full)
    with pytest.raises(
        CheckpointError, match=r"RESOURCE_EXHAUSTED: No space left on device\); free"
    ):
        checkpoints.save(2, state_of(2), {})
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints" / "plain").iterdir()] == ["1"]
    assert checkpoints.restore(state_of(0))[0] == 1


def train_until(error, checkpoints):
    with checkpoints.saving() as update:
        for epochs in (1, 2):
            update(epochs, state_of(epochs), {})
        raise error


def test_an_interrupt_saves_the_last_epoch(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train_until(KeyboardInterrupt, checkpoints)
    assert checkpoints.restore(state_of(0))[0] == 2


def test_an_error_saves_nothing(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    with pytest.raises(ZeroDivisionError):
        train_until(ZeroDivisionError, checkpoints)
    assert checkpoints.restore(state_of(0)) is None


def test_a_long_training_is_stored_after_its_last_epoch(tmp_path, monkeypatch):
    checkpoints = checkpoints_in(tmp_path)
    with checkpoints.saving() as update:
        update(1, state_of(1), {})
    assert checkpoints.restore(state_of(0)) is None
    monkeypatch.setattr(checkpoints_module, "SECONDS_WORTH_A_CHECKPOINT", 0.0)
    with checkpoints.saving() as update:
        update(1, state_of(1), {})
    assert checkpoints.restore(state_of(0))[0] == 1
