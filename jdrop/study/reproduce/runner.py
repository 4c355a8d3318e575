"""Runs a protocol in a folder: each part is stored when it is complete."""

import ast
import dataclasses
import hashlib
import importlib
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jdrop.study.data import DataError, Progress
from jdrop.study.reproduce import PROTOCOLS
from jdrop.study.reproduce.protocol import Cell, Options, PartResult, Protocol, cells, labelled
from jdrop.study.run_folder import RunFolder, versions


@dataclass(frozen=True)
class Reproduction:
    """The numbers of a protocol beside ours.

    Attributes:
        protocol: what was run.
        cells: of the parts that are complete.
        results: by name of the part.
        run_config: the options of the run, as JSON holds them.
        versions: of the software, and the device.
    """

    protocol: Protocol
    cells: list[Cell]
    results: Mapping[str, PartResult]
    run_config: dict[str, Any]
    versions: dict[str, str]


def load_protocol(name: str) -> Protocol:
    """The protocol of this name in `PROTOCOLS`."""
    protocol: Protocol = importlib.import_module(PROTOCOLS[name]).make_protocol()
    return protocol


def reproduce(
    protocol: Protocol,
    options: Options,
    folder: Path,
    save: Callable[[Reproduction], None],
    progress: Progress,
) -> Reproduction:
    """Runs the parts that the folder does not hold, one after another.

    Args:
        protocol: what to run.
        options: of the user.
        folder: stores the parts; a run that was stopped goes on from there.
        save: is called with all results so far when a part is complete.
        progress: is called with the parts, and the steps of a part, that are done.

    Raises:
        DataError: a file of the data is missing, or holds something else.
        RunError: the folder holds another run.
        OSError: a file cannot be read or written.
    """
    run_config = {
        "protocol": protocol.name,
        "splits": options.splits,
        "fraction": options.fraction,
        "seed": options.seed,
        "program": _program_hash(protocol),
        "data": _hashes(protocol, options.data_dir),
    }
    run_folder = RunFolder(folder, run_config)
    results = {}
    with run_folder.locked():
        for index, part in enumerate(protocol.parts):
            progress(protocol.name, index, len(protocol.parts))
            if not run_folder.is_complete(part):
                _run_part(protocol, part, options, run_folder, progress)
            results[part] = run_folder.require(part, PartResult)
            reproduction = Reproduction(
                protocol, cells(protocol, results), dict(results), run_config, versions()
            )
            save(reproduction)
        progress(protocol.name, len(protocol.parts), len(protocol.parts))
    return reproduction


def _run_part(
    protocol: Protocol, part: str, options: Options, run_folder: RunFolder, progress: Progress
) -> None:
    """Computes and stores a part."""
    start = time.monotonic()
    result = protocol.run_part(part, options, labelled(progress, part))
    result = dataclasses.replace(result, seconds=time.monotonic() - start)
    run_folder.store(part, result)


def _program_hash(protocol: Protocol) -> str:
    """The hash of the code that computes the parts of a protocol."""
    run_part = getattr(protocol.run_part, "func", protocol.run_part)  # It may be a `partial`.
    files = _program(Path(inspect.getfile(run_part)))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _program(module: Path) -> list[Path]:
    """The module of a protocol, and the modules of this package that it imports.

    The published numbers and the rules of agreement are no part of it. A change of how `Options`
    rounds epochs goes unnoticed.
    """
    found: set[Path] = set()
    left = {module}
    while left:
        file = left.pop()
        found.add(file)
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == __package__:
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith(__package__):
                names.add(str(node.module).rpartition(".")[2])
        names -= {"published", "protocol"}
        files = {Path(__file__).with_name(f"{name}.py") for name in names}
        left |= {file for file in files - found if file.exists()}
    return sorted(found)


def _hashes(protocol: Protocol, data_dir: Path) -> dict[str, str]:
    """The hash of each file that the protocol reads.

    Raises:
        DataError: a file is missing.
    """
    hashes = {}
    for name in protocol.files:
        path = data_dir / name
        if not path.is_file():
            raise DataError(
                f"data_dir (--data-dir) must hold the file {name}, but {path} does not exist; "
                f"{protocol.name} reads {', '.join(protocol.files)}."
            )
        hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes
