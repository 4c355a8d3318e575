"""Writes files whole or not at all: a killed run leaves at most a `.partial` file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file, which takes the place of `path` at the end.

    If the block raises, the temporary file goes, and `path` stays as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "numbers.txt")
        ...     with replacing(path) as partial:
        ...         _ = partial.write_text("1 2 3")
        ...     path.read_text()
        '1 2 3'
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # Otherwise a power cut may leave an empty file of the new name.
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
