"""Checkpoints: what is stored comes back on any devices, and damage is found and told."""

import itertools
import logging
import threading
import time

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
    names = {path.name for path in (tmp_path / "checkpoints" / "plain").iterdir()}
    assert names == {"2", "2.json", "3", "3.json"}
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


def damages(path):
    """The file without its content, or a part of it, or with one flipped bit anywhere."""
    content = path.read_bytes()
    yield None
    yield content[: len(content) // 2]
    for place in range(0, len(content), max(1, len(content) // 50)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        yield bytes(flipped)


def test_no_damage_changes_a_state(tmp_path, caplog):
    """The damaged checkpoint is set aside with a warning, and the one before comes back."""
    checkpoints = checkpoints_in(tmp_path)
    folder = tmp_path / "checkpoints" / "plain"
    for epochs in (1, 2):
        checkpoints.save(epochs, state_of(epochs), {"epochs": epochs})
    files = [folder / "2.json", *(path for path in (folder / "2").rglob("*") if path.is_file())]
    assert len(files) > 3
    stored = jax.tree.map(np.asarray, state_of(0))
    for path in files:
        content = path.read_bytes()
        for damaged in damages(path):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            try:
                fine = checkpoints._read(2, stored)
            except (ValueError, KeyError, FileNotFoundError):
                continue
            finally:
                path.write_bytes(content)
            assert path.name == "2.json"  # White space may change.
            assert_equal_states(fine[0], state_of(2))
            assert fine[1] == {"epochs": 2}
    path.write_bytes(b"damaged")
    epochs, restored, log = checkpoints.restore(state_of(0))
    assert (epochs, log) == (1, {"epochs": 1})
    assert_equal_states(restored, state_of(1))
    assert "2 was not used: it is damaged, of another run" in caplog.text
    # The damaged one is in nobody's way.
    checkpoints.save(2, state_of(2), {"epochs": 2})
    assert checkpoints.restore(state_of(0))[0] == 2


def test_a_save_that_is_killed_before_its_end_is_no_checkpoint(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(1, state_of(1), {})
    checkpoints.save(2, state_of(2), {})
    (tmp_path / "checkpoints" / "plain" / "2.json").unlink()
    assert checkpoints.restore(state_of(0))[0] == 1
    checkpoints.save(2, state_of(3), {})
    assert_equal_states(checkpoints.restore(state_of(0))[1], state_of(3))


@pytest.mark.parametrize("other", [("plain", {"seed": 1}), ("dropout", {"seed": 0})])
def test_a_checkpoint_of_another_training_is_refused(tmp_path, caplog, other):
    checkpoints_in(tmp_path / "other", *other).save(1, state_of(1), {})
    checkpoints = checkpoints_in(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "other" / "checkpoints" / other[0]).rename(
        tmp_path / "run" / "checkpoints" / "plain"
    )
    assert checkpoints.restore(state_of(0)) is None
    assert "it is damaged, of another run or of another version of jdrop" in caplog.text
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
    for kept in (0, 1, 100):
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


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(tmp_path, monkeypatch, caplog):
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(1, state_of(1), {})

    class Full(checkpoints_module.ocp.Checkpointer):
        def save(self, path, *args, **kwargs):
            path.with_name(f"{path.name}.orbax-checkpoint-tmp").mkdir()
            logging.getLogger("absl").error("Traceback: ...")
            raise ValueError("RESOURCE_EXHAUSTED: ...: No space left on device [...]\n...")

    monkeypatch.setattr(checkpoints_module.ocp, "Checkpointer", Full)
    with pytest.raises(
        CheckpointError, match=r"plain \(No space left on device\); free some space"
    ):
        checkpoints.save(2, state_of(2), {})
    assert not caplog.text
    assert not logging.getLogger("absl").disabled
    monkeypatch.undo()
    names = {path.name for path in (tmp_path / "checkpoints" / "plain").iterdir()}
    assert names == {"1", "1.json"}
    assert checkpoints.restore(state_of(0))[0] == 1


def train_until(error, checkpoints):
    with checkpoints.saving() as update:
        for epochs in (1, 2):
            update(epochs, state_of(epochs), {})
        raise error


def test_a_training_in_short_stretches_is_saved_all_the_same(tmp_path, monkeypatch):
    """As in cross-validation, which may end a training after each candidate epoch."""
    now = itertools.count(0.0, 2.0)
    monkeypatch.setattr(checkpoints_module.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(checkpoints_module, "SECONDS_WORTH_A_CHECKPOINT", 12.0)
    monkeypatch.setattr(checkpoints_module, "WRITING_SHARE", 1e9)
    checkpoints = checkpoints_in(tmp_path)
    for epochs in (1, 2, 3, 4):
        with checkpoints.saving() as update:
            update(epochs, state_of(epochs), {})
    assert checkpoints.restore(state_of(0))[0] >= 3


def test_an_interrupt_saves_the_last_epoch(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train_until(KeyboardInterrupt, checkpoints)
    assert checkpoints.restore(state_of(0))[0] == 2


def slow_saves(monkeypatch, checkpoints, error=None):
    """Saves that begin at once and end, or fail, when the returned event is set."""
    may_end, save = threading.Event(), checkpoints.save

    def slow_save(*arguments):
        assert may_end.wait(60)
        if error is not None:
            raise error
        save(*arguments)

    monkeypatch.setattr(checkpoints_module, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(checkpoints, "save", slow_save)
    return may_end


@pytest.mark.parametrize(("share", "second"), [(1e9, 2), (1e-9, 1)])
def test_checkpoints_that_take_long_to_write_are_written_less_often(
    tmp_path, monkeypatch, share, second
):
    checkpoints = checkpoints_in(tmp_path)
    monkeypatch.setattr(checkpoints_module, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(checkpoints_module, "WRITING_SHARE", share)
    with checkpoints.saving() as update:
        update(1, state_of(1), {})
        while checkpoints.restore(state_of(0)) is None:
            time.sleep(0.01)
        time.sleep(0.1)  # The thread has removed older checkpoints.
        update(2, state_of(2), {})
    assert checkpoints.restore(state_of(0))[0] == second


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    checkpoints = checkpoints_in(tmp_path)
    may_end = slow_saves(monkeypatch, checkpoints)
    with checkpoints.saving() as update:
        for epochs in (1, 2, 3):  # The checkpoint after the first epoch is not written yet.
            update(epochs, state_of(epochs), {"epochs": epochs})
        assert checkpoints_in(tmp_path).restore(state_of(0)) is None
        may_end.set()
    # The block has waited for the thread.
    epochs, restored, log = checkpoints_in(tmp_path).restore(state_of(0))
    assert (epochs, log) == (1, {"epochs": 1})
    assert_equal_states(restored, state_of(1))


def test_an_interrupt_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    checkpoints = checkpoints_in(tmp_path)
    may_end = slow_saves(monkeypatch, checkpoints)
    threading.Timer(0.2, may_end.set).start()
    with pytest.raises(KeyboardInterrupt):
        train_until(KeyboardInterrupt, checkpoints)
    names = {path.name for path in (tmp_path / "checkpoints" / "plain").iterdir()}
    assert names == {"1", "1.json", "2", "2.json"}
    assert checkpoints.restore(state_of(0))[0] == 2


@pytest.mark.parametrize("is_seen", ["at the next epoch", "at the end", "at an interrupt"])
def test_a_checkpoint_that_fails_in_its_thread_is_told(tmp_path, monkeypatch, is_seen):
    checkpoints = checkpoints_in(tmp_path)
    slow_saves(monkeypatch, checkpoints, CheckpointError("the disk is full")).set()

    def train():
        with checkpoints.saving() as update:
            update(1, state_of(1), {})
            if is_seen == "at an interrupt":
                raise KeyboardInterrupt
            if is_seen == "at the next epoch":
                for _ in range(1000):
                    time.sleep(0.01)
                    update(2, state_of(2), {})
                pytest.fail("the failure was not told before the end")

    with pytest.raises(CheckpointError, match="the disk is full"):
        train()


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
