"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from headgate.catalog import Method
from headgate.claims.evidence import Evidence, claim_status, find_evidence
from headgate.claims.progress import format_seconds
from headgate.claims.verdict import SMOKE
from headgate.report.format import VERDICT_MARKS, criterion_rule, effect_text, mean_text

__all__ = ["print_evidence", "print_method", "print_methods", "verdict_text"]

_STYLES = {
    "reproduced": "bold green",
    "explained by a control": "bold magenta",
    "inconclusive": "bold yellow",
    "contradicted": "bold red",
    "stale": "yellow",
    "not measured": "dim",
}


def verdict_text(verdict: str) -> Text:
    """The verdict in its colour, with a mark for those who see none."""
    return Text(f"{VERDICT_MARKS[verdict]} {verdict}", style=_STYLES[verdict])


def print_methods(console: Console, methods: Sequence[Method], folders: Sequence[Path] | None = None) -> None:
    """One line per method: slug, family, kinds, claim status, summary."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    table.add_column("method", no_wrap=True, style="cyan")
    table.add_column("family", no_wrap=True)
    table.add_column("kinds")
    table.add_column("claim", no_wrap=True)
    table.add_column("what it is")
    for method in methods:
        status = verdict_text(claim_status(method, folders=folders))
        table.add_row(method.slug, method.family, ", ".join(method.kinds), status, escape(method.summary))
    console.print(table)
    noun = "method" if len(methods) == 1 else "methods"
    console.print(f"\n{len(methods)} {noun}; 'headgate show NAME' tells more", style="dim", highlight=False)


def print_evidence(console: Console, method: Method, evidence: Evidence, figure: Path | None = None) -> None:
    """The verdict table of one claim: arms with their measurements, then criteria with effects and verdicts."""
    claim = method.claim
    arms = _arms_table(method, evidence)
    criteria = Table(box=None, pad_edge=False, header_style="bold")
    criteria.add_column("criterion")
    criteria.add_column("effect [95% interval] > margin", no_wrap=True)
    criteria.add_column("verdict", no_wrap=True)
    for criterion, result in zip(claim.criteria_at(evidence.scale), evidence.criteria, strict=True):
        verdict = verdict_text(result.verdict)
        if result.explained_by:
            verdict.append(f"\n({', '.join(result.explained_by)})")
        statement = escape(result.statement) + (f" [dim]({escape(result.reason)})[/]" if result.reason else "")
        criteria.add_row(statement, effect_text(result, claim.metrics[criterion.metric]), verdict)

    seeds = len(evidence.seeds)
    foot = Text(
        f"{len(evidence.cells)} cells, {seeds} seed{'s' * (seeds != 1)}; mean ± standard deviation over seeds; "
        f"{format_seconds(evidence.seconds)} of work in {evidence.jobs} process{'es' * (evidence.jobs != 1)}, "
        f"{evidence.finished}",
        style="dim",
    )
    if evidence.scale == SMOKE:
        foot.append("\nsmoke scale: the code ran; whether the claim holds is for larger scales to say", style="yellow")
    if figure is not None:
        foot.append(f"\nfigure: {figure}")
    parts: list[Table | Text] = [
        Text(claim.statement, style="italic"),
        Text(""),
        arms,
        Text(""),
        criteria,
        Text(""),
        foot,
    ]
    title = Text.assemble((f"{method.slug} [{evidence.scale}] ", "bold"), verdict_text(evidence.verdict))
    console.print(Panel(Group(*parts), title=title, title_align="left", padding=(1, 2)))
    for failure in evidence.failed:
        console.print(f"[red]failed:[/] {failure.arm}, seed {failure.seed}: {escape(failure.error)}", highlight=False)
        if failure.traceback:
            console.print(Text(failure.traceback.rstrip(), style="dim"))


def _arms_table(method: Method, evidence: Evidence) -> Table:
    """Arms as rows while the metrics are few; otherwise metrics as rows and arms as columns."""
    claim = method.claim
    shown = _shown_metrics(evidence, method)
    heads = [
        escape(claim.metrics[name].label + (f" ({unit})" if (unit := claim.metrics[name].unit) else ""))
        for name in shown
    ]
    rows = []
    for arm in claim.arms_at(evidence.scale):
        records = [record for record in evidence.cells if record.cell.arm == arm.name]
        seconds = f"{sum(record.seconds for record in records) / len(records):.1f} s" if records else "–"
        values = [mean_text(evidence.values(arm.name, name), claim.metrics[name]) for name in shown]
        rows.append([escape(arm.label), arm.role, *values, seconds])
    cells = [["arm", "role", *heads, "time a seed"], *rows]
    wide = len(shown) > 5
    if wide:
        cells = [list(column) for column in zip(*cells, strict=True)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(cells[0]):
        left = i == 0 or (i == 1 and not wide)
        table.add_column(head, justify="left" if left else "right", style="cyan" if i == 0 else None)
    for row in cells[1:]:
        table.add_row(*row)
    return table


def _shown_metrics(evidence: Evidence, method: Method) -> list[str]:
    """The metrics that some arm measured: all of them while they are few, otherwise those that a criterion uses."""
    measured = [name for name in method.claim.metrics if any(name in record.metrics for record in evidence.cells)]
    if len(measured) <= 5:
        return measured
    used = {method.claim.primary}
    for criterion in method.claim.criteria_at(evidence.scale):
        used |= {criterion.metric, criterion.against_metric or criterion.metric}
    return [name for name in measured if name in used]


def print_method(console: Console, method: Method, folders: Sequence[Path] | None = None) -> None:
    """Everything about one method: parts, presets, usage, claim with criteria, evidence, citation."""
    console.print(Text.assemble((method.slug, "bold cyan"), f"  {method.title}"))
    console.print(method.summary, style="italic", markup=False, highlight=False)
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    paper = method.paper
    facts.add_row("family", f"{method.family} ({', '.join(method.kinds)})")
    facts.add_row("paper", escape(f"{', '.join(paper.authors)}: {paper.title}, {paper.venue} {paper.year}"))
    if paper.arxiv:
        facts.add_row("arXiv", paper.arxiv)
    if method.official:
        facts.add_row("official code", escape(f"{method.official.repository} ({method.official.licence})"))
    facts.add_row("import from", method.package)
    facts.add_row("parts", ", ".join(method.exports))
    console.print(facts)
    if method.presets:
        presets = Table(box=None, pad_edge=False, header_style="bold", title="presets", title_justify="left")
        for column in ("name", "builds", "what it is"):
            presets.add_column(column)
        presets.add_column("parameters", justify="right")
        for preset in method.presets.values():
            count = f"{preset.parameters:,}" if preset.parameters is not None else "–"
            presets.add_row(preset.name, preset.export, escape(preset.summary), count)
        console.print("", presets)
    console.print("\n[bold]use[/]")
    console.print(Syntax(method.usage, "python", background_color="default"))
    _print_claim(console, method, folders)
    console.print("\n[bold]citation[/]")
    console.print(method.bibtex(), markup=False, highlight=False)


def _print_claim(console: Console, method: Method, folders: Sequence[Path] | None) -> None:
    claim = method.claim
    console.print(f"\n[bold]claim[/] [dim]({escape(claim.source)})[/]")
    console.print(claim.statement, markup=False, highlight=False)
    arms = Table(box=None, pad_edge=False, header_style="bold", title="arms", title_justify="left")
    for column in ("arm", "role", "what it is"):
        arms.add_column(column)
    for arm in claim.arms:
        arms.add_row(arm.name, arm.role, escape(f"{arm.label}: {arm.summary}"))
    criteria = Table(box=None, pad_edge=False, header_style="bold", title="criteria", title_justify="left")
    for column in ("criterion", "as an inequality", "controls", "scales"):
        criteria.add_column(column)
    for criterion in claim.criteria:
        criteria.add_row(
            escape(criterion.statement),
            escape(criterion_rule(criterion, claim)),
            ", ".join(criterion.controls) or "–",
            ", ".join(criterion.scales or ()) or "all",
        )
    scales = Table(box=None, pad_edge=False, header_style="bold", title="scales", title_justify="left")
    for column in ("scale", "seeds", "what it is", "status"):
        scales.add_column(column)
    for scale in claim.scales.values():
        needs = f" (needs {scale.needs})" if scale.needs else ""
        status = verdict_text(claim_status(method, scale.name, folders))
        scales.add_row(scale.name, str(scale.seeds), escape(scale.summary + needs), status)
    console.print("", arms, "", criteria, "", scales)
    for entry in claim.history:
        console.print(f"criteria changed {entry['date']}: {entry['change']} ({entry['reason']})", markup=False)
    console.print("\n[bold]evidence[/]")
    found = [find_evidence(method.slug, scale, folders) for scale in claim.scales]
    for evidence in found:
        if evidence is not None:
            print_evidence(console, method, evidence)
    if not any(found):
        console.print(f"none yet: headgate reproduce {method.slug}", style="dim", highlight=False)
