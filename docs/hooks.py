"""Builds the navigation, methods included, and brings the figures of ``evidence/`` in without a second copy of them."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

EVIDENCE = Path(__file__).parent.parent / "evidence"


PAGES = {
    "Headgate": "index.md",
    "Claims and verdicts": "claims.md",
    "Add a method": "add-a-method.md",
    "Contract suite": "contract.md",
    "Train": "train.md",
    "Data": "data.md",
    "Gated linear attention": "gated-linear-attention.md",
    "Benchmarks": "benchmarks.md",
}


def on_config(config: Any) -> Any:
    """Set the navigation: the pages above, then every method in alphabetical order."""
    methods = sorted(path.name for path in (Path(__file__).parent / "methods").glob("*.md") if path.name != "index.md")
    entries: list[Any] = [{title: page} for title, page in PAGES.items()]
    entries.append({"Methods": ["methods/index.md", *(f"methods/{name}" for name in methods)]})
    config["nav"] = entries
    return config


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
