"""How the site reads the package and its docstrings."""

import re
from typing import Any

import griffe


class SiteDocstrings(griffe.Extension):
    """Makes sections `Example:` code, and hides the docstring of `__post_init__`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring of one object."""
        if obj.name == "__post_init__":
            obj.docstring = None
        if obj.docstring:
            # Griffe reads the section as code only under its plural name.
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
