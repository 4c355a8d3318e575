"""What the command `jdrop reproduce` does with its options: runs a protocol, shows the results."""

from functools import partial
from pathlib import Path

from rich.console import Console

from jdrop.study.progress import with_progress
from jdrop.study.reproduce import report
from jdrop.study.reproduce.protocol import Options
from jdrop.study.reproduce.runner import load_protocol, reproduce


def run(name: str, options: Options, folder: Path | None, command: str, console: Console) -> Path:
    """Runs a protocol, writes its report, and prints the table.

    Args:
        name: of the protocol.
        options: of the user.
        folder: of the results; None takes one in `./reproduction`, the same for equal options.
        command: what the user typed, for the report.
        console: shows the progress and the table.

    Returns:
        The path of the page.

    Raises:
        UserError: files or a folder that do not fit.
        OSError: a file cannot be read or written.
    """
    protocol = load_protocol(name)
    if folder is None:
        words = [name]
        words += [f"splits-{options.splits}"] * (options.splits is not None)
        words += [f"fraction-{options.fraction:g}"] * (options.fraction < 1)
        words += [f"seed-{options.seed}"] * (options.seed != 0)
        folder = Path("reproduction", "-".join(words))
    console.print(f"{protocol.title}: {protocol.paper}; folder: {folder}", soft_wrap=True)
    save = partial(report.write, command=command, folder=folder)
    reproduction = with_progress(partial(reproduce, protocol, options, folder, save), console)
    console.print(report.terminal(reproduction))
    console.print(report.rule(protocol), highlight=False, markup=False)
    for sentence in report.answer(reproduction):
        console.print(f"- {sentence}", highlight=False, markup=False)
    return folder / "report.html"
