"""A hook of the site: links out of docs/ become the paths that they name, which must exist in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text, in which only links between pages are left.

    Raises:
        FileNotFoundError: a link leads to a file that is not there.
    """
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def name(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: the link {match[2]} leads to nothing")
        return f"{match[1]} (`{path.relative_to(ROOT).as_posix()}`)"

    return OUTSIDE.sub(name, markdown)
