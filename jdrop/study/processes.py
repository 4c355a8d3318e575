"""Which processes share a run: found as JAX finds them, or named by the options of the command.

Members need no communication, so processes meet through the folder of the run alone: see
`jdrop.study.slices` and `jdrop.study.run_folder`.
"""

import os
from dataclasses import dataclass

import jax

# JAX tells in public who this process is only when it has started the devices of all processes.
from jax._src.distributed import global_state

from jdrop.study.errors import UserError

NUM_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Where SLURM and Open MPI say how many processes they have started together."""

KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"
"""Kubernetes sets this in the pods of an indexed Job."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        index: of this process. Process 0 predicts, stores the parts and reports.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    @property
    def others(self) -> list[int]:
        """The indices of the other processes."""
        return [index for index in range(self.count) if index != self.index]


def initialised_processes() -> Processes:
    """The processes of a program that has called `jax.distributed.initialize`, or this one alone.

    Example:
        >>> initialised_processes()
        Processes(index=0, count=1)
    """
    if not jax.distributed.is_initialized():
        return Processes()
    return Processes(jax.process_index(), jax.process_count())


def join_processes(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> Processes:
    """Waits until all processes of the command have started. JAX must not be at work yet.

    Under SLURM, Open MPI and Kubernetes JAX finds the other processes if no argument is given. JAX
    also gives each process its own GPU there. Its service runs only until all have met: it would
    end all processes when one of them dies.

    Args:
        coordinator: `HOST:PORT` of process 0, which serves there for a moment.
        process_id: the index of this process, from 0.
        num_processes: how many there are; 1 means that this process is alone, whatever started it.

    Raises:
        UserError: some arguments without the others, an index out of range, or processes that do
            not meet.
    """
    given = {
        "--coordinator": coordinator,
        "--process-id": process_id,
        "--num-processes": num_processes,
    }
    missing = [name for name, value in given.items() if value is None]
    if num_processes == 1 and len(missing) == 2:
        return Processes()
    if not missing:
        assert process_id is not None
        assert num_processes is not None
        if process_id >= num_processes:
            raise UserError(
                f"--process-id must be below --num-processes, got {process_id} of {num_processes}; "
                "the first process is 0."
            )
        if num_processes == 1:
            return Processes()
    elif len(missing) < 3:
        raise UserError(
            f"{' and '.join(missing)} must be given too: --coordinator HOST:PORT, --process-id and "
            "--num-processes belong together."
        )
    elif not _are_several():
        return Processes()
    # Otherwise JAX would catch SIGTERM, by which a run is stopped.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
        processes = Processes(global_state.process_id, global_state.num_processes)
        jax.distributed.shutdown()
        # What the shutdown leaves. From here on JAX and Orbax see a process that is alone.
        global_state.process_id, global_state.num_processes = 0, 1
    except Exception as error:  # JAX raises many, of its own and of what it asks.
        raise UserError(
            f"the processes did not meet ({_first_line(error)}). Start each with --coordinator "
            "HOST:PORT, --process-id and --num-processes; or with --num-processes 1, if it is to "
            "run alone."
        ) from error
    return processes


def _are_several() -> bool:
    """Whether SLURM, Open MPI or Kubernetes has started several processes for this command."""
    if any(os.environ.get(name, "1") != "1" for name in NUM_TASKS):
        return True
    return KUBERNETES_INDEX in os.environ


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
