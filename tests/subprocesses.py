"""Processes of one machine that tests start."""

import socket
from concurrent.futures import ThreadPoolExecutor


def free_port():
    """A port on which nothing listens yet."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def finish(started):
    """The exit code, the output and the errors of each process."""
    with ThreadPoolExecutor(len(started)) as threads:
        printed = list(threads.map(lambda process: process.communicate(timeout=500), started))
    return [(process.returncode, *texts) for process, texts in zip(started, printed, strict=True)]
