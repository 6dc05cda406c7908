"""The templates of pages and cards, and how they are filled in."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from foldgpt.report.rows import markdown_row


def templates(*, html: bool) -> Environment:
    """The package's templates; a value that is not given is an error, not nothing.

    Args:
        html: escape what is put in. Markdown is not escaped: every value in it is the run's own.
    """
    environment = Environment(
        loader=PackageLoader("foldgpt.report"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )
    environment.filters["markdown_row"] = markdown_row
    return environment
