"""Wikipedia dumps as plain text: MediaWiki markup and reference lists taken out."""

from __future__ import annotations

import bz2
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from foldgpt.errors import SourceError
from foldgpt.progress import bar

#: Sections of lists and references: no running text follows the first of them.
_APPENDICES = re.compile(
    r"^=+\s*(see also|references|notes|footnotes|citations|bibliography|sources|further reading|external links)"
    r"\s*=+\s*$",
    re.IGNORECASE | re.MULTILINE,
)
#: References, taken out before parsing: one that is not closed well hides the markup around it from the parser.
_REFERENCE = re.compile(r"<ref[^<>]*/>|<ref\b.*?</ref\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
#: Tags whose content is not running text.
_TAGS_WITHOUT_TEXT = frozenset(
    ("table", "gallery", "math", "timeline", "imagemap", "score", "syntaxhighlight", "source")
)
#: `File:` and `Category:` links, and links to the same article in another language (`de:…`).
_LINK_WITHOUT_TEXT = re.compile(r"\s*(file|image|category|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE)
#: An article with less text than this is a stub or a disambiguation page.
_SHORTEST_ARTICLE = 500


def markup_parser() -> Any:
    """The library that reads MediaWiki markup.

    Raises:
        SourceError: it is not installed.
    """
    try:
        import mwparserfromhell
    except ImportError:
        raise SourceError(
            "reading demo:wikipedia needs mwparserfromhell. Install it with: pip install 'foldgpt[demo]' (in foldgpt's "
            "own folder: '.[demo]')"
        ) from None
    return mwparserfromhell


def plain_articles(dump: Path, parser: Any) -> Iterator[str]:
    """The articles of a compressed MediaWiki dump as plain text, headed by their titles."""
    articles = list(_articles(dump))
    with bar("reading Wikipedia", total=len(articles)) as progress:
        for title, markup in articles:
            text = _plain_text(markup, parser)
            if len(text) >= _SHORTEST_ARTICLE:
                yield f"{title}\n\n{text}\n"
            progress.advance()


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and markup of each article (main namespace, no redirects)."""
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            namespace = page.tag.removesuffix("page")
            is_article = page.findtext(f"{namespace}ns") == "0" and page.find(f"{namespace}redirect") is None
            markup = page.findtext(f"{namespace}revision/{namespace}text")
            if is_article and markup:
                yield page.findtext(f"{namespace}title") or "", markup
            page.clear()


def _plain_text(markup: str, parser: Any) -> str:
    """Running text of an article: no templates, tables, references, images, categories or appendices."""
    appendix = _APPENDICES.search(markup)
    body = markup[: appendix.start()] if appendix else markup
    code = parser.parse(_REFERENCE.sub("", body))
    for tag in code.filter_tags(matches=lambda node: str(node.tag).lower() in _TAGS_WITHOUT_TEXT):
        _remove(code, tag)
    for link in code.filter_wikilinks(matches=lambda node: bool(_LINK_WITHOUT_TEXT.match(str(node.title)))):
        _remove(code, link)
    text = code.strip_code()
    text = re.sub(r"\(\s*[,;]*\s*\)", "", text)  # brackets that held nothing but a template
    text = re.sub(r"^ *(\{\||[|!]).*\n?", "", text, flags=re.MULTILINE)  # tables that were not closed
    text = re.sub(r"'{2,}", "", text)  # emphasis that was left unbalanced
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    text = re.sub(r" +([,.;:\n])|(?<=\n) +", r"\1", text)
    return re.sub(r"\n\s*\n", "\n\n", text).strip()


def _remove(code: Any, node: Any) -> None:
    # A node may stand inside one that was removed before it.
    with contextlib.suppress(ValueError):
        code.remove(node)
