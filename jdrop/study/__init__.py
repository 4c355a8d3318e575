"""The comparison of dropout networks with ensembles: `compare`, its settings and its results.

The command `jdrop` is the same from a shell.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from jdrop.study.errors import UserError
from jdrop.study.settings import Settings

if TYPE_CHECKING:
    from jdrop.study.comparison import compare
    from jdrop.study.results import Comparison

__all__ = ["Comparison", "Settings", "UserError", "compare"]


def __getattr__(name: str) -> Any:
    # Imported at their first use, so that the command refuses a wrong option at once.
    modules = {"compare": "comparison", "Comparison": "results"}
    if name in modules:
        return getattr(importlib.import_module(f"jdrop.study.{modules[name]}"), name)
    raise AttributeError(f"module 'jdrop.study' has no attribute {name!r}")


def main() -> int:
    """Runs the command `jdrop` with the arguments of the shell, and returns its exit code."""
    try:
        from jdrop.study import cli
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"error: the command needs packages that are not installed ({error}); install them "
            "with `pip install 'jdrop[study]'`.\n"
        )
        return 1
    except KeyboardInterrupt:  # The imports take a second.
        sys.stderr.write("stopped before the work began.\n")
        return 130
    return cli.main()
