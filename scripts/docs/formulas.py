"""Formulas become MathML when the site is built, which browsers show without a script."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Converts the formulas of a page, docstrings included."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        return convert(html.unescape(match["tex"]), display=display)

    return FORMULA.sub(mathml, content)
