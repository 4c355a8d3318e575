"""Figures as SVG within a page, with values that show under the pointer."""

import io
import re
from collections.abc import Iterable

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PREFIX = "hover:"
"""Marks the identifiers that hold a text to show."""


def add_hover(artist: Artist, text: str) -> None:
    """Shows a text when the pointer is over an artist."""
    # Matplotlib writes the identifier into the SVG, and nothing else that a user can set.
    artist.set_gid(PREFIX + text)


def add_hover_points(
    axes: Axes,
    x: Iterable[int | float],
    y: Iterable[int | float],
    texts: Iterable[str],
    size: int = 9,
) -> None:
    """Adds invisible points that show texts when the pointer is over them.

    Args:
        axes: of the points.
        x: by point.
        y: by point.
        texts: by point.
        size: diameter of a point.
    """
    for at_x, at_y, text in zip(x, y, texts, strict=True):
        (point,) = axes.plot([at_x], [at_y], ls="", marker="o", ms=size, alpha=0, zorder=10)
        add_hover(point, text)


def inline_svg(figure: Figure, name: str) -> str:
    """Returns the figure as an `<svg>` element, with identifiers that are unique on the page.

    Args:
        figure: to draw.
        name: prefix of all identifiers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The text of an attribute is escaped as that of an element must be.
    svg = re.sub(rf'<(g|path) id="{PREFIX}([^"]*)"([^>]*)>', r"<\1\3><title>\2</title>", svg)
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
