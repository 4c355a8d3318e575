"""The locks of a run folder: one run in each folder, and who of its processes is at work.

A process locks a file of its own for as long as it works. The system frees the lock when the
process ends, even if it is killed. No clock of a machine or of a file server plays a part.
"""

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jdrop.study.errors import RunError, UserError
from jdrop.study.processes import Processes

try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None  # type: ignore[assignment]

START_SECONDS = 300.0
"""How long processes that start together wait for each other."""

POLL_SECONDS = 0.05
"""How often a process looks for what another one does."""

LOCK_ATTEMPTS = 4
"""A process that looks whether another one is at work holds its lock for a moment."""

_logger = logging.getLogger(__name__)


class Locks:
    """The locks of the processes of a run.

    `lock` is that of process 0, `lock-INDEX` that of another process. The first line of a file says
    which process has locked it; by the second line the processes of a run find each other, and
    process 0 tells the others which mistake of the user has ended it.

    Args:
        folder: of the run.
        processes: of the run.
    """

    def __init__(self, folder: Path, processes: Processes) -> None:
        self._folder, self._processes = folder, processes
        self._said: dict[str, Any] = {}
        self._are_seen = True  # Whether the processes see each other's locks.

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other run works in the folder meanwhile. Waits for the other processes of this run.

        Raises:
            RunError: another run is at work in the folder, or a process does not come.
        """
        path = self._path(self._processes.index)
        with path.open("a+", encoding="utf-8") as file:
            if not _lock(file):
                raise self._other_run(path)
            # A process of another run may still be at work after its process 0 has ended.
            for other in self._folder.glob("lock-*"):
                index = other.name.removeprefix("lock-")
                is_ours = index.isdecimal() and int(index) < self._processes.count
                if not is_ours and _is_locked(other):
                    raise self._other_run(other)
            self._meet(file)
            try:
                yield
            except UserError as error:
                # The error matters more than a disk on which it cannot be said.
                with contextlib.suppress(OSError):
                    self._say(file, **self._said, error=str(error))
                raise

    def has_ended(self, index: int) -> bool:
        """Whether another process of this run has ended, in whatever way.

        False where the system cannot tell.
        """
        is_other = index != self._processes.index
        return is_other and self._are_seen and _is_locked(self._path(index)) is False

    def check_first(self) -> None:
        """Raises if a mistake of the user has ended process 0: no process can finish the run then.

        Raises:
            UserError: the sentence is that of process 0.
        """
        if not self._processes.is_first and "error" in (said := self._hear(0)):
            raise UserError(said["error"])

    def _path(self, index: int) -> Path:
        return self._folder / (f"lock-{index}" if index else "lock")

    def _other_run(self, path: Path) -> RunError:
        holder = (path.read_text(encoding="utf-8").splitlines() or ["an unknown process"])[0]
        return RunError(
            f"another run is at work in {self._folder} ({holder}); wait until it ends, stop it, or "
            "take another folder."
        )

    def _meet(self, file: IO[str]) -> None:
        """Waits until all processes of the run are here.

        Each chooses a word anew, so that what an earlier run has left is not taken for an answer:
        process 0 waits until all others repeat its word, then it repeats theirs. What was said
        stays when a process ends, so a process that has nothing to do need not wait.

        A process that has just repeated the word of process 0 holds its lock. If process 0 sees it
        free, the file system does not show locks to other machines.
        """
        own, count = uuid.uuid4().hex, self._processes.count
        deadline = time.monotonic() + START_SECONDS
        if self._processes.is_first:
            self._say(file, word=own, count=count, words=[])
            words: dict[int, str] = {}
            unseen: list[int] = []
            while len(words) < count - 1:
                absent = [index for index in self._processes.others if index not in words]
                self._wait(deadline, absent)
                for index in absent:
                    if (said := self._hear(index)).get("echo") == own:
                        words[index] = said["word"]
                        # At once: it may be killed while process 0 waits for the others.
                        if self.has_ended(index):
                            unseen.append(index)
            if unseen:
                self._are_seen = False
                _logger.warning(
                    "process 0 does not see the locks of process %s in %s: no process will notice "
                    "if another one ends early. Mount the folder with locks over machines.",
                    ", ".join(map(str, unseen)),
                    self._folder,
                )
            in_order = [words[index] for index in sorted(words)]
            self._say(file, word=own, count=count, words=in_order, are_seen=self._are_seen)
            return
        echo = None
        self._say(file, word=own, echo=echo)
        while own not in (said := self._hear(0)).get("words", []):
            if said.get("count") == count and said["word"] != echo:
                echo = said["word"]
                self._say(file, word=own, echo=echo)
            self._wait(deadline, [0])
        self._are_seen = said["are_seen"]

    def _wait(self, deadline: float, absent: list[int]) -> None:
        """Waits for a moment. Raises after the deadline."""
        if time.monotonic() > deadline:
            raise RunError(
                f"process {self._processes.index} of {self._processes.count} waited "
                f"{START_SECONDS:.0f} s in {self._folder} for process "
                f"{', '.join(map(str, absent))}. Start all with the same command, in a folder on a "
                "file system that all of them see."
            )
        time.sleep(POLL_SECONDS)

    def _say(self, file: IO[str], **said: Any) -> None:
        self._said = said
        file.truncate(0)
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        file.write(f"{holder}\n{json.dumps(said)}\n")
        file.flush()
        # Some network file systems show others only what has been synchronized.
        os.fsync(file.fileno())

    def _hear(self, index: int) -> dict[str, Any]:
        """What another process has said; empty if it has said nothing."""
        try:
            _, said = self._path(index).read_text(encoding="utf-8").splitlines()
            return json.loads(said)
        except (OSError, ValueError):  # It may be writing.
            return {}


def _lock(file: IO[str]) -> bool:
    """Locks a file, where the system can; False if another process has locked it."""
    if fcntl is None:
        return True
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt + 1 < LOCK_ATTEMPTS:
                time.sleep(POLL_SECONDS)
        except OSError:  # Some network file systems have no locks.
            _logger.warning("%s cannot be locked: start no second run in this folder.", file.name)
            return True
        else:
            return True
    return False


def _is_locked(path: Path) -> bool | None:
    """Whether a process has locked a file; None where the system cannot tell."""
    if fcntl is None:
        return None
    try:
        with path.open(encoding="utf-8") as file:
            # Shared, so that two processes that look at once do not see each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False
