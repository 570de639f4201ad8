"""A hook of the site: links out of docs/ become the paths that they name, which must exist in the repository.

Pictures from there are put into the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"(!?)\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
PICTURES = "pictures"  # folder of the site


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return a page's text, in which only links between pages and pictures are left.

    Raises:
        FileNotFoundError: a link leads to a file that is not there.
    """
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def name(match: re.Match[str]) -> str:
        path = (folder / match[3]).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: the link {match[3]} leads to nothing")
        place = path.relative_to(ROOT).as_posix()
        if match[1]:
            picture = f"{PICTURES}/{place}"
            if files.get_file_from_path(picture) is None:
                files.append(File.generated(config, picture, abs_src_path=str(path)))
            return f"![{match[2]}]({posixpath.relpath(picture, posixpath.dirname(page.file.src_uri) or '.')})"
        return f"{match[2]} (`{place}`)"

    return OUTSIDE.sub(name, markdown)
