"""Brings the figures of ``evidence/`` into the site without a second copy in the repository."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

EVIDENCE = Path(__file__).parent.parent / "evidence"


def on_files(files: Files, config: Any) -> Files:
    """Add every figure as ``evidence/<name>``."""
    for path in sorted(EVIDENCE.glob("*.png")):
        files.append(File.generated(config, f"evidence/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Pages link the figures where they stand in the repository; in the site they stand below its root."""
    folder = posixpath.dirname(page.file.src_uri)
    return markdown.replace(
        f"]({posixpath.relpath('../evidence', folder or '.')}/", f"]({posixpath.relpath('evidence', folder or '.')}/"
    )
