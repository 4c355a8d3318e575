"""Several processes that share a run: the numbers of one process, and what is left when one ends.

Most tests run the processes as threads: they meet through files and locks alone. Numbers are equal
up to rounding, since programs for other numbers of networks and devices are compiled in other ways.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from subprocesses import finish, free_port

from jdrop.study import comparison, locks, processes
from jdrop.study.data import Dataset
from jdrop.study.diverged import DivergedError
from jdrop.study.errors import RunError, UserError
from jdrop.study.methods import WEIGHT_DECAYS
from jdrop.study.models import MLP, Model
from jdrop.study.processes import Processes, join_processes
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings
from jdrop.study.slices import ScoresPart, delete_slices, divide, wait_for
from jdrop.study.training import NetworkSpec, Trainer, Validation

SETTINGS = Settings(replicates=2, batch_size=10)
MODEL = Model(lambda: MLP((4,), 3))
SPEC = NetworkSpec(MODEL.dropout, 2, 6, optax.adam(0.01), record=True)
ADAMW = optax.inject_hyperparams(optax.adamw)(0.05, weight_decay=0.0)

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_ensembles.py"
TINY = ["--replicates", "2", "--ensemble-size", "2", "--budget", "2", "--num-samples", "2"]
TINY += ["--train-size", "60", "--batch-size", "20", "--no-controls"]


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(50, 5)).astype(np.float32)
    labels = (np.argmax(inputs[:, :3], 1)).astype(np.int32)
    return Dataset("noise", inputs[:40], labels[:40], inputs[40:], labels[40:], 3)


class KilledError(Exception):
    pass


def train(folder, data, count=1, *, killed=None, spec=SPEC, **arguments):
    """What each process of a training returns.

    The process `killed` ends before the last epoch of its slice.
    """

    def run(index):
        def progress(what, done, total):
            if index == killed and what.startswith("training") and done == total:
                raise KilledError

        run_folder = RunFolder(folder, {}, Processes(index, count))
        try:
            with run_folder.locked():
                trainer = Trainer(run_folder, SETTINGS, progress)
                trained = trainer.fit_networks(
                    jax.random.key(0),
                    spec,
                    data,
                    checkpoint="networks",
                    description="networks",
                    **arguments,
                )
                return trained, trainer.missing
        except KilledError:
            return None, {}

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def assert_same(trained, whole):
    """The networks and what was recorded of them, up to rounding."""

    def arrays(networks):
        log = networks.log
        return networks.variables, log.epochs, log.train, log.test, log.validation, log.diverged

    expected, got = arrays(whole), arrays(trained)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
    for name in ("num_networks", "num_parameters", "num_bytes", "epoch_flops"):
        assert getattr(trained, name) == getattr(whole, name)


@pytest.mark.parametrize(("num_networks", "num_slices"), [(10, 4), (2, 4), (7, 7), (100, 3)])
@pytest.mark.parametrize("min_first", [1, 2])
def test_every_network_is_in_one_slice(num_networks, num_slices, min_first):
    ranges = divide(num_networks, num_slices, min_first)
    indices = [index for networks in ranges for index in range(networks.start, networks.stop)]
    assert indices == [*range(num_networks)]
    assert len(ranges[0]) >= min_first
    sizes = [len(networks) for networks in ranges[1:]]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_the_networks_of_one(tmp_path, data, count):
    """Networks that are kept at two epochs, and a learning curve of those of the first slice."""
    ((whole, _),) = train(tmp_path / "whole", data, stops=(2, 6))
    (trained, missing), *others = train(tmp_path / "several", data, count, stops=(2, 6))
    assert_same(trained, whole)
    assert not missing
    assert others == [(None, {})] * (count - 1)


@pytest.mark.slow
def test_networks_keep_their_settings_and_divergence_in_slices(tmp_path, data):
    """Networks 2 and 3 of 8 diverge. They have an infinite weight decay."""
    decays = (0.0, math.inf, *WEIGHT_DECAYS[2:])
    spec = dataclasses.replace(
        SPEC, network=MODEL.plain, members=4, optimizer=ADAMW, weight_decays=decays, record=False
    )
    ((whole, _),) = train(tmp_path / "whole", data, spec=spec)
    (trained, _), _ = train(tmp_path / "several", data, 2, spec=spec)
    assert trained.log.diverged == [2, 3]
    assert_same(trained, whole)


@pytest.mark.slow
def test_recorded_networks_that_all_diverge_end_the_run(tmp_path, data):
    spec = dataclasses.replace(SPEC, optimizer=optax.sgd(math.inf))
    with pytest.raises(DivergedError, match="4 of 4 networks"):
        train(tmp_path, data, 2, spec=spec)


def validation_of(is_enough, min_epochs=2):
    def losses(epoch, variables):
        leaves = jax.tree.leaves(variables)
        assert all(len(leaf) == 4 for leaf in leaves)
        return [float(np.abs(leaf).sum()) for leaf in leaves]

    def rows(epoch):
        """Each network has other examples."""
        return np.stack([np.resize(np.arange(10 + network), 40) for network in range(4)])

    return Validation(rows, (1, 2, 4, 6), losses, is_enough, min_epochs)


@pytest.mark.grid
@pytest.mark.parametrize(("num_scored", "expected"), [(1, 2), (3, 3), (5, 4)])
def test_all_processes_end_a_validation_together(tmp_path, data, num_scored, expected):
    """It is enough after one candidate, but training does not end before two."""
    validation = validation_of(lambda scores: len(scores) >= num_scored)
    ((whole, _),) = train(tmp_path / "whole", data, validation=validation)
    (trained, _), *_ = train(tmp_path / "several", data, 4, validation=validation)
    assert len(trained.log.validation) == expected
    assert_same(trained, whole)


def test_a_process_does_not_wait_for_scores_that_process_0_has_read_and_removed(tmp_path):
    """Process 1 looks for the scores when the part that needed them is stored already."""
    folders = [RunFolder(tmp_path, {}, Processes(index, 2)) for index in range(2)]
    with ThreadPoolExecutor(2) as threads, contextlib.ExitStack() as stack:
        list(threads.map(lambda folder: stack.enter_context(folder.locked()), folders))
        folders[0].store("tuning", ScoresPart([0.5]))
        assert not wait_for(folders[1], "slices/tuning/scores-after-1", 0, needed_by="tuning")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("validated", [False, True])
def test_a_run_of_four_processes_goes_on_with_any_number(tmp_path, data, count, validated):
    """The third of them ends early. What the others have stored is not trained again.

    There are three slices, since the first holds the first member of both replicates.
    """
    arguments = {"validation": validation_of(lambda scores: False)} if validated else {}
    ((whole, _),) = train(tmp_path / "whole", data, **arguments)
    folder = tmp_path / "several"
    (nothing, missing), *_ = train(folder, data, 4, killed=2, **arguments)
    assert nothing is None
    assert missing == {"networks": "networks: networks 3 (process 2)"}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("slices/**/*.npz")}
    assert len(before) == (11 if validated else 2)
    (trained, missing), *_ = train(folder, data, count, **arguments)
    assert_same(trained, whole)
    assert not missing
    assert {path: path.stat().st_mtime_ns for path in before} == before
    delete_slices(RunFolder(folder, {}), "networks")
    assert not [path for path in folder.rglob("slices/**/*") if path.is_file()]


@pytest.mark.slow
def test_a_damaged_slice_is_trained_again(tmp_path, data):
    ((whole, _),) = train(tmp_path / "whole", data)
    folder = tmp_path / "several"
    train(folder, data, 2)
    (path,) = folder.rglob("2-3.npz")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (trained, _), _ = train(folder, data, 2)
    assert_same(trained, whole)


@pytest.mark.slow
def test_a_training_that_one_process_began_stays_with_it(tmp_path, data, monkeypatch):
    monkeypatch.setattr("jdrop.study.checkpoints.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    ((whole, _),) = train(tmp_path / "whole", data)
    train(tmp_path / "several", data, 1, killed=0)
    (trained, _), (nothing, _) = train(tmp_path / "several", data, 2)
    assert_same(trained, whole)
    assert nothing is None
    assert not (tmp_path / "several" / "parts").exists()


@pytest.mark.slow
def test_a_process_that_comes_late_finds_the_part(tmp_path, data):
    """Process 0 has ended, and has removed the slices that this process would wait for."""
    validation = validation_of(lambda scores: False)
    arguments = {"checkpoint": "networks", "description": "", "validation": validation}
    RunFolder(tmp_path, {})
    for is_stored in (False, True):
        run_folder = RunFolder(tmp_path, {}, Processes(1, 2))
        if is_stored:
            run_folder.store("networks", {"done": True})
        trainer = Trainer(run_folder, SETTINGS, lambda *call: None)
        assert trainer.fit_networks(jax.random.key(0), SPEC, data, **arguments) is None
        assert len(trainer.missing) == (not is_stored)


def hold(folder, index, count):
    """Locks a folder as a process of a run does, and returns the lock."""
    lock = RunFolder(folder, {}, Processes(index, count)).locked()
    lock.__enter__()
    return lock


def test_the_processes_of_one_run_share_a_folder_and_refuse_others(tmp_path):
    with ThreadPoolExecutor(3) as threads:
        held = list(threads.map(lambda index: hold(tmp_path, index, 3), range(3)))
    for index in range(3):
        with pytest.raises(RunError, match=rf"another run is at work .*process {os.getpid()} on"):
            hold(tmp_path, index, 3)
    first, *others = held
    first.__exit__(None, None, None)
    # The other processes of the run are still at work.
    with pytest.raises(RunError, match="another run is at work"):
        hold(tmp_path, 0, 1)
    for lock in others:
        lock.__exit__(None, None, None)
    hold(tmp_path, 0, 1).__exit__(None, None, None)


@pytest.mark.parametrize(("index", "absent"), [(0, 1), (1, 0)])
def test_a_process_that_is_left_alone_says_so(tmp_path, monkeypatch, index, absent):
    RunFolder(tmp_path, {})
    monkeypatch.setattr(locks, "START_SECONDS", 0.2)
    with pytest.raises(RunError, match=rf"process {index} of 2 waited .* for process {absent}\."):
        hold(tmp_path, index, 2)


def meet(folder, count):
    """The run folders of processes that hold their locks, and the locks."""
    folders = [RunFolder(folder, {}, Processes(index, count)) for index in range(count)]
    held = [folder.locked() for folder in folders]
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(lambda lock: lock.__enter__(), held))
    return folders, held


def end(lock, error=None):
    """Ends a process of `meet`, by an error if one is given."""
    lock.__exit__(error and type(error), error, None)


def test_a_mistake_that_process_0_finds_ends_the_others(tmp_path):
    folders, held = meet(tmp_path, 3)
    for folder in folders:
        folder.locks.check_first()
    end(held[0], DivergedError("training diverged."))
    for folder in folders[1:]:
        with pytest.raises(UserError, match=r"^training diverged\.$"):
            folder.locks.check_first()
        with pytest.raises(UserError, match=r"^training diverged\.$"):
            wait_for(folder, "plain", 0)
    for lock in held[1:]:
        end(lock)
    folders, held = meet(tmp_path, 3)  # The next run hears nothing of it.
    folders[1].locks.check_first()
    end(held[1], DivergedError("only here."))
    end(held[0], KeyboardInterrupt())
    folders[2].locks.check_first()
    assert folders[2].locks.has_ended(0)
    end(held[2])


def test_a_process_hears_of_an_error_at_once(tmp_path):
    """Process 0 may fail before the others have read its last word."""
    first, second = (RunFolder(tmp_path, {}, Processes(index, 2)).locks for index in range(2))

    def fail():
        with first.locked():
            raise DivergedError("training diverged.")

    def follow():
        with second.locked():
            time.sleep(0.2)
            second.check_first()

    with ThreadPoolExecutor(2) as threads:
        failed, followed = threads.submit(fail), threads.submit(follow)
        for future in (failed, followed):
            assert str(future.exception(timeout=20)) == "training diverged."


def test_who_is_at_work_does_not_depend_on_clocks(tmp_path, monkeypatch):
    """Files of another day, and a machine whose clock was changed."""
    folders, held = meet(tmp_path, 3)
    end(held[1])
    for shift in (-(10**6), 10**6):
        for path in tmp_path.glob("lock*"):
            os.utime(path, (time.time() + shift,) * 2)
        with monkeypatch.context() as changed:
            now = time.time() - shift
            changed.setattr(time, "time", lambda now=now: now)
            for folder in (folders[0], folders[2]):
                seen = [folder.locks.has_ended(index) for index in range(3)]
                assert seen == [False, True, False]
    end(held[0])
    end(held[2])


def test_locks_that_other_machines_do_not_see_say_nothing(tmp_path, monkeypatch, caplog):
    """A mount of a network file system may keep the locks of each machine to itself."""
    monkeypatch.setattr(locks, "_is_locked", lambda path: False)
    folders, held = meet(tmp_path, 2)
    assert "process 0 does not see the locks of process 1" in caplog.text
    assert not any(folder.locks.has_ended(1 - index) for index, folder in enumerate(folders))
    for lock in held:
        end(lock)


def test_a_process_that_is_killed_while_the_others_come_has_ended(tmp_path, monkeypatch, caplog):
    """Its free lock does not mean that this file system hides locks: all would wait for ever."""
    folders = [RunFolder(tmp_path, {}, Processes(index, 3)) for index in range(3)]
    first, killed, last = (folder.locked() for folder in folders)
    is_heard = threading.Event()
    has_ended, locks_wait = locks.Locks.has_ended, locks.Locks._wait

    def heard(self, index):
        found = has_ended(self, index)
        is_heard.set()
        return found

    def wait(self, deadline, absent):
        if self is folders[1].locks and is_heard.wait(0.01):
            raise KeyboardInterrupt
        locks_wait(self, deadline, absent)

    monkeypatch.setattr(locks, "START_SECONDS", 20.0)
    monkeypatch.setattr(locks.Locks, "has_ended", heard)
    monkeypatch.setattr(locks.Locks, "_wait", wait)
    with ThreadPoolExecutor(2) as threads:
        here = threads.submit(first.__enter__)
        with pytest.raises(KeyboardInterrupt):
            killed.__enter__()
        last.__enter__()
        here.result(timeout=20)
    assert not caplog.text
    for folder in (folders[0], folders[2]):
        assert [folder.locks.has_ended(index) for index in range(3)] == [False, True, False]
    for lock in (first, last):
        end(lock)


def test_what_a_process_stored_last_is_found_on_a_file_system_that_remembers(tmp_path, monkeypatch):
    """A client of a network file system remembers which files a folder lacks.

    It asks again after it has made a file there.
    """
    folders, held = meet(tmp_path, 2)
    folders[1].store("slices/plain/2/1", ScoresPart([0.5]))
    end(held[1])
    made = []
    make, is_complete = tempfile.NamedTemporaryFile, RunFolder.is_complete

    def making(dir):
        made.append(Path(dir))
        return make(dir=dir)

    def remembering(self, name, **options):
        is_seen = (tmp_path / "parts" / name).parent in made
        return is_seen and is_complete(self, name, **options)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", making)
    monkeypatch.setattr(RunFolder, "is_complete", remembering)
    assert wait_for(folders[0], "slices/plain/2/1", 1)
    assert not wait_for(folders[0], "slices/exact/2/1", 1)  # There is no such folder.
    end(held[0])


def test_a_process_that_waits_for_long_looks_less_often(tmp_path, monkeypatch):
    folders, held = meet(tmp_path, 2)
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 100:
            folders[0].store("summary", ScoresPart([]))

    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", sleep)
        assert wait_for(folders[1], "summary", 0)
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1], len(pauses)) == (locks.POLL_SECONDS, 1.0, 100)
    for lock in held:
        end(lock)


def test_what_an_earlier_run_has_left_is_no_answer(tmp_path, monkeypatch):
    with ThreadPoolExecutor(2) as threads:
        for lock in list(threads.map(lambda index: hold(tmp_path, index, 2), range(2))):
            lock.__exit__(None, None, None)
    test_a_process_that_is_left_alone_says_so(tmp_path, monkeypatch, 1, 0)
    test_a_process_that_is_left_alone_says_so(tmp_path, monkeypatch, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 0, None), "--num-processes must be given too"),
        ((None, None, 2), "--coordinator and --process-id must be given too"),
        (("host:1", 2, 2), "--process-id must be below --num-processes, got 2 of 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        join_processes(*arguments)


def test_a_process_that_nothing_has_started_with_others_is_alone(monkeypatch):
    for name in (*processes.NUM_TASKS, processes.KUBERNETES_INDEX):
        monkeypatch.delenv(name, raising=False)
    assert join_processes(None, None, None) == Processes(0, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert join_processes(None, None, 1) == Processes(0, 1)
    assert join_processes("host:1", 0, 1) == Processes(0, 1)


@pytest.mark.parametrize("variable", [*processes.NUM_TASKS, processes.KUBERNETES_INDEX])
def test_jax_says_who_a_process_of_a_cluster_is(monkeypatch, variable):
    """JAX sees a process that is alone afterwards."""
    asked = []

    def initialize(*arguments):
        asked.append(arguments)
        processes.global_state.process_id, processes.global_state.num_processes = 2, 4

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv(variable, "4")
    assert join_processes(None, None, None) == Processes(2, 4)
    assert asked == [(None, None, None)]
    assert (processes.global_state.process_id, processes.global_state.num_processes) == (0, 1)


def test_processes_that_do_not_meet_are_told_what_to_do(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such host\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"did not meet \(no such host\)\. .*--num-processes 1"):
        join_processes(None, None, None)


def test_compare_needs_a_folder_that_its_processes_share(monkeypatch, data):
    monkeypatch.setattr(comparison, "initialised_processes", lambda: Processes(1, 2))
    examples = data.train_inputs, data.train_labels, data.test_inputs, data.test_labels
    with pytest.raises(UserError, match="out must name a folder that all 2 processes see"):
        comparison.compare(lambda: MLP((4,), 3), *examples)


def start(folder, count, options, model=("--hidden", "4")):
    """Starts the processes of a command on this machine."""
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    meeting = ["--coordinator", address, "--num-processes", str(count), "--process-id"]
    return [
        subprocess.Popen(
            [
                *(sys.executable, str(SCRIPT), *TINY, *model, *options, "--out", "out"),
                *((*meeting, str(index)) if count > 1 else ()),
            ],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


INITIALISED = """
import sys
import jax, jdrop, jdrop.linen, numpy as np
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(sys.argv[1], 2, index := int(sys.argv[2]))
from pathlib import Path
from jdrop.study import checkpoints
from jdrop.study.models import MLP
from jdrop.study.run_folder import RunFolder
checkpoints.SECONDS_BETWEEN_CHECKPOINTS = 0.0
state = {"w": np.arange(6.0).reshape(2, 3)}
mine = RunFolder(Path(f"checkpoints-{index}"), {}).checkpoints("plain", 2)
mine.save(3, state, {})
epochs, restored, _ = mine.restore({"w": np.zeros((2, 3))})
assert epochs == 3 and np.array_equal(restored["w"], state["w"])
x = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
y = (x.sum(1) > 0).astype("int32")
comparison = jdrop.compare(
    lambda: MLP((4,), 2), x[:40], y[:40], x[40:], y[40:], out="out", replicates=2, ensemble_size=2,
    budget=2, num_samples=2, epochs=3, batch_size=10, controls=False, theory=False, progress=False,
)
print(comparison.method("dropout").points[0].scores["nll"].mean)
"""
"""A program that calls `jax.distributed.initialize` itself."""


@pytest.mark.slow
def test_a_program_that_initialises_jax_shares_the_work_of_compare(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    results = finish(
        [
            subprocess.Popen(
                [sys.executable, "-c", INITIALISED, address, str(index)],
                cwd=tmp_path,
                env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
    )
    assert [code for code, _, _ in results] == [0, 0], results
    printed, other = (float(printed) for _, printed, _ in results)
    assert printed == other > 0
    assert (tmp_path / "out" / "report.html").exists()


def numbers_of(value, path=""):
    """The numbers of a report by their paths, without times."""
    if isinstance(value, dict):
        value = {name: child for name, child in value.items() if "seconds" not in name}
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value} if isinstance(value, int | float) else {}
    return {p: n for name, child in items for p, n in numbers_of(child, f"{path}/{name}").items()}


def assert_same_report(folder, other):
    reports = [json.loads((path / "out" / "results.json").read_text()) for path in (folder, other)]
    numbers, others = map(numbers_of, reports)
    assert len(numbers) > 100
    assert [*numbers] == [*others]
    # Where rounding swaps two examples, an AUROC of few errors changes by about a thousandth. The
    # ends of intervals over two replicates are far away, and rounding moves them as much.
    np.testing.assert_allclose([*numbers.values()], [*others.values()], rtol=5e-3, atol=2e-3)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one")
    ((code, _, errors),) = finish(start(folder, 1, ["--epochs", "4", "--no-theory"]))
    assert code == 0, errors
    return folder


def check_equal_to_one_process(tmp_path, one_process, count):
    results = finish(start(tmp_path, count, ["--epochs", "4", "--no-theory"]))
    assert [code for code, _, _ in results] == [0] * count, results
    assert results[0][1].splitlines()[-1] == str(Path("out", "report.html"))
    assert [printed for _, printed, _ in results[1:]] == [""] * (count - 1)
    assert_same_report(tmp_path, one_process)


@pytest.mark.slow
def test_two_processes_report_what_one_reports(tmp_path, one_process):
    check_equal_to_one_process(tmp_path, one_process, 2)


@pytest.mark.slow
def test_four_processes_report_what_one_reports(tmp_path, one_process):
    check_equal_to_one_process(tmp_path, one_process, 4)


DIVERGING = """
import flax.linen as nn, jax.numpy as jnp, jdrop.linen

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(4)(x))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return jnp.inf * nn.Dense(10)(x)
"""


@pytest.mark.slow
def test_networks_that_all_diverge_end_each_process_alike(tmp_path):
    (tmp_path / "diverging.py").write_text(DIVERGING)
    options = ["--epochs", "3", "--no-tune", "--no-theory"]
    results = finish(start(tmp_path, 2, options, model=("--model", "diverging:Net")))
    assert [code for code, _, _ in results] == [1, 1], results
    (_, _, errors), (_, printed, same_errors) = results
    assert re.fullmatch(r"error: training diverged: 4 of 4 plain networks have .*\n", errors)
    assert (printed, same_errors) == ("", errors)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_stops_no_other_and_loses_no_number(tmp_path, killed):
    """It is killed in its first training; the other one trains its own networks to the end."""
    options = ["--epochs", "500", "--no-tune", "--no-theory"]
    whole, several = tmp_path / "whole", tmp_path / "several"
    for folder in (whole, several):
        folder.mkdir()
    ((code, _, errors),) = finish(start(whole, 1, options))
    assert code == 0, errors
    started = start(several, 2, options)
    while not (several / "out" / "parts" / "slices" / "plain" / "2").exists():
        time.sleep(0.05)
        assert started[killed].poll() is None
    started[killed].send_signal(signal.SIGKILL)
    results = finish(started)
    code, _, errors = results[1 - killed]
    assert results[killed][0] == -signal.SIGKILL
    assert code == 1
    assert len(errors.splitlines()) == 1
    stored = {path.stem for path in several.rglob("slices/*/2/*.json")}
    if killed == 1:
        assert "plain: networks 2-3 (process 1); dropout: networks 2-3 (process 1)" in errors
        assert "Give the same command again" in errors
        assert stored == {"0-1", "0"}
    else:
        assert "process 0 has ended without the part" in errors
        assert stored == {"2-3", "1"}
    results = finish(start(several, 2, options))
    assert [code for code, _, _ in results] == [0, 0], results
    assert_same_report(several, whole)
