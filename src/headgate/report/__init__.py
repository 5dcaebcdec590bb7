"""Evidence → tables on the terminal, figures, and the method table of README and docs."""

from __future__ import annotations

from headgate.report.figure import draw_figure
from headgate.report.markdown import method_page, method_table
from headgate.report.terminal import print_evidence, print_method, print_methods

__all__ = ["draw_figure", "method_page", "method_table", "print_evidence", "print_method", "print_methods"]
