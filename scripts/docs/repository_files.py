"""What the site takes from the rest of the repository, where it stays the only copy.

Everything in `scripts/results/` is part of the site under the same name, so that the links between
those files hold there too. Links from pages to other files of the repository lead to its source.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[2]
SOURCE = "https://github.com/jdrop-dev/jdrop/blob/main/"

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the results: tables in Markdown, figures, reports and numbers."""
    results = REPOSITORY / "scripts" / "results"
    for path in sorted(results.rglob("*")):
        if path.is_file():
            name = "results" / path.relative_to(results)
            files.append(File.generated(config, name.as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files that the site does not hold into links to their source.

    Raises:
        FileNotFoundError: A link leads to no file of the repository.
    """
    folder = posixpath.dirname(page.file.src_uri)
    assert page.file.abs_src_path is not None
    source_folder = Path(page.file.abs_src_path).parent

    def source_link(match: re.Match[str]) -> str:
        link = match.group()
        if files.get_file_from_path(posixpath.normpath(posixpath.join(folder, link))):
            return link
        path = (source_folder / link).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: the link {link} leads to no file.")
        return SOURCE + path.relative_to(REPOSITORY).as_posix()

    return LINK.sub(source_link, markdown)
