"""Write the pages of the methods and the method table of the README from cards and evidence.

``python docs/generate.py`` writes them; ``--check`` fails where they differ from what would be written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from headgate.catalog import load_methods
from headgate.report.markdown import method_page, method_table

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- methods: generated from evidence/ by docs/generate.py -->", "<!-- end of methods -->"


def pages() -> dict[Path, str]:
    """Path → content of everything that is generated."""
    folders = [ROOT / "evidence"]
    methods = list(load_methods().values())
    content = {ROOT / "docs" / "methods" / f"{method.slug}.md": method_page(method, folders) for method in methods}
    table = method_table(methods, folders, link="{slug}.md")
    content[ROOT / "docs" / "methods" / "index.md"] = f"# Methods\n\n{table}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    content[ROOT / "README.md"] = f"{before}{BEGIN}\n{method_table(methods, folders)}{END}{after}"
    return content


def main() -> int:
    """Write the pages, or check them."""
    wanted = pages()
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: python docs/generate.py", file=sys.stderr)
        return bool(stale)
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
