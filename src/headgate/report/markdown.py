"""Markdown for README and docs, generated from cards and evidence alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from headgate.catalog import Method
from headgate.claims.evidence import Evidence, claim_status, find_evidence, is_stale
from headgate.report.format import VERDICT_MARKS, criterion_rule, effect_text, mean_text

__all__ = ["method_page", "method_table"]


def method_table(methods: Sequence[Method], folders: Sequence[Path], link: str = "docs/methods/{slug}.md") -> str:
    """A Markdown table: method, what it is, the claim's verdict at laptop scale, its strongest line of evidence."""
    lines = ["| method | what it is | claim at laptop scale | seeds | time, one core |", "|---|---|---|---|---|"]
    for method in methods:
        status = claim_status(method, folders=folders)
        evidence = find_evidence(method.slug, "laptop", folders)
        seeds = str(len(evidence.seeds)) if evidence else "–"
        time = f"{evidence.seconds / 60:.1f} min" if evidence else "–"
        if evidence:
            passed = sum(result.verdict == "reproduced" for result in evidence.criteria)
            status_text = f"{VERDICT_MARKS[status]} {status} ({passed} of {len(evidence.criteria)} criteria)"
        else:
            status_text = f"{VERDICT_MARKS[status]} {status}"
        name = f"[{method.slug}]({link.format(slug=method.slug)})"
        lines.append(f"| {name} | {_cell(method.summary)} | {status_text} | {seeds} | {time} |")
    return "\n".join(lines) + "\n"


def method_page(method: Method, folders: Sequence[Path], figures: str = "../../evidence") -> str:
    """The docs page of one method: what it is, how to use it, its claim, its evidence, its citation."""
    paper = method.paper
    arxiv = f", [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    parts = [
        f"# {method.title}",
        f"`{method.slug}` · {method.family} · {', '.join(method.kinds)}",
        method.summary,
        f"{', '.join(paper.authors)}: *{paper.title}*, {paper.venue} {paper.year}{arxiv}.",
    ]
    if method.official:
        parts.append(f"Official code: [{method.official.repository}](https://github.com/{method.official.repository}) "
                     f"({method.official.licence}).")  # fmt: skip
    parts += ["## Use", f"```python\n{method.usage}\n```", "## Parts", _parts(method)]
    if method.presets:
        rows = ["| preset | builds | what it is | parameters |", "|---|---|---|---|"]
        for preset in method.presets.values():
            count = f"{preset.parameters:,}" if preset.parameters is not None else "–"
            rows.append(f"| `{preset.name}` | `{preset.export}` | {_cell(preset.summary)} | {count} |")
        parts += ["## Presets", "\n".join(rows)]
    parts += [
        "## Claim",
        f"> {method.claim.statement}",
        f"Source: {method.claim.source}.",
        _arms(method),
        _criteria(method),
    ]
    for scale in method.claim.scales.values():
        evidence = find_evidence(method.slug, scale.name, folders)
        if evidence is not None:
            parts += _evidence(method, evidence, figures)
    if method.claim.history:
        parts.append("### Changes of the criteria")
        parts += [f"- {entry['date']}: {entry['change']} ({entry['reason']})" for entry in method.claim.history]
    parts += ["## Citation", f"```bibtex\n{method.bibtex()}\n```"]
    return "\n\n".join(parts) + "\n"


def _parts(method: Method) -> str:
    return "\n".join(f"- `headgate.{name}`" for name in method.exports)


def _arms(method: Method) -> str:
    rows = ["| arm | role | what it is |", "|---|---|---|"]
    rows += [f"| `{arm.name}` | {arm.role} | {_cell(arm.label)}: {_cell(arm.summary)} |" for arm in method.claim.arms]
    return "\n".join(rows)


def _criteria(method: Method) -> str:
    rows = ["| criterion | as an inequality | controls | scales |", "|---|---|---|---|"]
    for criterion in method.claim.criteria:
        controls = ", ".join(f"`{name}`" for name in criterion.controls) or "–"
        scales = ", ".join(criterion.scales or ()) or "all"
        rows.append(
            f"| {_cell(criterion.statement)} | `{criterion_rule(criterion, method.claim)}` | {controls} | {scales} |"
        )
    return "\n".join(rows)


def _evidence(method: Method, evidence: Evidence, figures: str) -> list[str]:
    claim = method.claim
    status = "stale" if is_stale(method, evidence) else evidence.verdict
    hardware = evidence.hardware
    rows = ["| arm | " + " | ".join(_metric_head(method, name) for name in _measured(method, evidence)) + " |"]
    rows.append("|---" * (1 + len(_measured(method, evidence))) + "|")
    for arm in claim.arms_at(evidence.scale):
        values = [
            mean_text(evidence.values(arm.name, name), claim.metrics[name]) for name in _measured(method, evidence)
        ]
        rows.append(f"| {_cell(arm.label)} | " + " | ".join(values) + " |")
    verdicts = ["| criterion | effect [95% interval] > margin | verdict |", "|---|---|---|"]
    for criterion, result in zip(claim.criteria_at(evidence.scale), evidence.criteria, strict=True):
        extra = f" ({', '.join(result.explained_by)})" if result.explained_by else ""
        effect = effect_text(result, claim.metrics[criterion.metric])
        verdicts.append(
            f"| {_cell(result.statement)} | {effect} | {VERDICT_MARKS[result.verdict]} {result.verdict}{extra} |"
        )
    return [
        f"## Evidence at {evidence.scale} scale: {status}",
        claim.scales[evidence.scale].summary,
        f"![The claim of {method.slug}, measured]({figures}/{evidence.name}.png)",
        *_pictures(evidence, figures),
        "\n".join(rows),
        "\n".join(verdicts),
        *(finding["text"] for finding in claim.findings if finding["scale"] == evidence.scale),
        f"{len(evidence.seeds)} seeds, mean ± standard deviation; {evidence.seconds / 60:.1f} minutes of work in "
        f"{evidence.jobs} processes on {hardware.get('processor')} ({hardware.get('cores')} cores), "
        f"torch {evidence.versions.get('torch')}, {evidence.finished}. "
        f"Again: `headgate reproduce {method.slug} --scale {evidence.scale}`.",
    ]


def _pictures(evidence: Evidence, figures: str) -> list[str]:
    """The pictures that the arms chose to show, with the first seed."""
    if not evidence.pictures:
        return []
    head = "| arm | picture |\n|---|---|\n"
    names = [(picture, picture.removeprefix(f"{evidence.name}-").removesuffix(".png")) for picture in evidence.pictures]
    return [head + "\n".join(f"| {name} | ![{name}]({figures}/{quote(picture)}) |" for picture, name in names)]


def _measured(method: Method, evidence: Evidence) -> list[str]:
    return [name for name in method.claim.metrics if any(name in record.metrics for record in evidence.cells)]


def _metric_head(method: Method, name: str) -> str:
    metric = method.claim.metrics[name]
    return f"{_cell(metric.label)} ({metric.unit})" if metric.unit else _cell(metric.label)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
