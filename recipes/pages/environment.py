"""Templates of pages, which extend `page.html.jinja`."""

from pathlib import Path

import jinja2

HEAD = 1000
"""Bytes of a page that hold the name of its command."""


def environment(folder: Path, command: str) -> jinja2.Environment:
    """An environment with the templates of `folder`; all values are escaped.

    Args:
        folder: of templates.
        command: that writes the pages, such as ``train``; it is named in their heads (`is_page_of`).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["command"] = command
    return environment


def is_page_of(file: Path, command: str) -> bool:
    """Whether a file is a page that this command has written."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return f'content="gpt-oss-vision {command}"'.encode() in opened.read(HEAD)
