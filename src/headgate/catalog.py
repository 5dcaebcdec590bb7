"""The index of methods, read from their cards. Imports no torch.

A method is a folder that holds a ``card.toml`` (its *room*). Headgate's own rooms stand under
``headgate/methods/<family>/<room>/``. Another package adds rooms through an entry point of the group
``headgate.methods`` whose value is a package: either a room itself, or a package of ``<family>/<room>/`` folders::

    [project.entry-points."headgate.methods"]
    my_lab = "my_lab.methods"

A card with a missing, unknown or wrong field is a :class:`headgate.errors.CardError` that names file and field.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headgate.errors import CardError, ClaimError, HeadgateError

__all__ = [
    "KINDS",
    "ROLES",
    "Arm",
    "Claim",
    "Criterion",
    "Method",
    "Metric",
    "Official",
    "Paper",
    "Preset",
    "Scale",
    "find_method",
    "load_methods",
    "read_card",
    "search_methods",
]

KINDS = (
    "backbone", "benchmark", "decoding", "evaluation", "gate", "head", "layer",
    "loss", "metric", "model", "op", "procedure", "representation",
)  # fmt: skip
ROLES = ("method", "baseline", "ablation", "control")
ENTRY_POINT_GROUP = "headgate.methods"


@dataclass(frozen=True)
class Paper:
    """Where the method was published."""

    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    arxiv: str | None = None

    def bibtex(self, key: str) -> str:
        """The citation as a BibTeX entry under ``key``."""
        lines = [
            f"  title = {{{self.title}}}",
            f"  author = {{{' and '.join(self.authors)}}}",
            f"  booktitle = {{{self.venue}}}",
            f"  year = {{{self.year}}}",
        ]
        if self.arxiv:
            lines += [f"  eprint = {{{self.arxiv}}}", "  archivePrefix = {arXiv}"]
        return f"@inproceedings{{{key},\n" + ",\n".join(lines) + "\n}"


@dataclass(frozen=True)
class Official:
    """The authors' own code."""

    repository: str
    licence: str
    commit: str | None = None


@dataclass(frozen=True)
class Preset:
    """A named configuration: ``headgate.create_model(name)`` builds it."""

    name: str
    export: str
    arguments: Mapping[str, Any]
    summary: str
    parameters: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Arm:
    """One thing that a claim compares."""

    name: str
    role: str
    label: str
    summary: str
    scales: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Metric:
    """A number that every arm reports."""

    name: str
    label: str
    unit: str
    better: str


@dataclass(frozen=True)
class Criterion:
    """One testable sentence of a claim.

    The effect of a seed is ``metric(arm) - metric(against)`` (or ``- value``), its sign turned for ``below``. How an
    effect becomes a verdict stands in :mod:`headgate.claims.verdict`.
    """

    name: str
    statement: str
    metric: str
    arm: str
    relation: str
    against: str | None = None
    against_metric: str | None = None
    value: float | None = None
    margin: float = 0.0
    controls: tuple[str, ...] = ()
    scales: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Scale:
    """A size at which a claim is measured."""

    name: str
    seeds: int
    summary: str
    needs: str | None = None


@dataclass(frozen=True)
class Claim:
    """A paper's central claim, as it is tested here."""

    statement: str
    source: str
    primary: str
    arms: tuple[Arm, ...]
    metrics: Mapping[str, Metric]
    criteria: tuple[Criterion, ...]
    scales: Mapping[str, Scale]
    history: tuple[Mapping[str, str], ...] = ()
    findings: tuple[Mapping[str, str], ...] = ()

    def scale(self, name: str) -> Scale:
        """The scale called ``name``.

        Raises:
            ClaimError: there is none.
        """
        if name not in self.scales:
            raise ClaimError(f"unknown scale {name!r}; this claim has {', '.join(self.scales)}")
        return self.scales[name]

    def arms_at(self, scale: str) -> tuple[Arm, ...]:
        """The arms that are measured at ``scale``."""
        return tuple(arm for arm in self.arms if arm.scales is None or scale in arm.scales)

    def criteria_at(self, scale: str) -> tuple[Criterion, ...]:
        """The criteria that count at ``scale``."""
        return tuple(criterion for criterion in self.criteria if criterion.scales is None or scale in criterion.scales)


@dataclass(frozen=True)
class Method:
    """All that a card says, and where its room stands."""

    slug: str
    title: str
    summary: str
    family: str
    kinds: tuple[str, ...]
    exports: tuple[str, ...]
    paper: Paper
    usage: str
    presets: Mapping[str, Preset]
    claim: Claim
    folder: Path
    package: str
    official: Official | None = None
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def bibtex(self) -> str:
        """The paper's citation as BibTeX."""
        author = re.sub(r"\W", "", self.paper.authors[0].split()[-1]).lower()
        return self.paper.bibtex(f"{author}{self.paper.year}{self.slug.replace('-', '')}")


class _Table:
    """A table of a card that knows its place, so that every complaint names file and field."""

    def __init__(self, path: Path, where: str, values: Any) -> None:
        self.path, self.where = path, where
        if not isinstance(values, dict):
            raise CardError(f"{path}: {where} must be a table, got {type(values).__name__}")
        self.values = values
        self.seen: set[str] = set()

    def name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def fail(self, key: str, problem: str) -> CardError:
        return CardError(f"{self.path}: field {self.name(key)!r} {problem}")

    def take(self, key: str, kind: type | tuple[type, ...], *, required: bool = True, default: Any = None) -> Any:
        self.seen.add(key)
        if key not in self.values:
            if required:
                raise self.fail(key, "is missing")
            return default
        value = self.values[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            raise self.fail(key, f"must be {expected}, got {type(value).__name__}: {value!r}")
        return value

    def text(self, key: str, **options: Any) -> Any:
        value = self.take(key, str, **options)
        if isinstance(value, str) and not value.strip():
            raise self.fail(key, "must not be empty")
        return value.strip() if isinstance(value, str) else value

    def choice(self, key: str, allowed: tuple[str, ...], **options: Any) -> str:
        value = self.text(key, **options)
        if value is not None and value not in allowed:
            raise self.fail(key, f"must be one of {', '.join(repr(a) for a in allowed)}, got {value!r}")
        return value

    def texts(self, key: str, *, required: bool = True, minimum: int = 1) -> tuple[str, ...] | None:
        values = self.take(key, list, required=required)
        if values is None:
            return None
        if len(values) < minimum or not all(isinstance(v, str) and v.strip() for v in values):
            raise self.fail(key, f"must be a list of at least {minimum} text(s), got {values!r}")
        if len(set(values)) != len(values):
            raise self.fail(key, f"names something twice: {values!r}")
        return tuple(values)

    def table(self, key: str, *, required: bool = True) -> _Table | None:
        values = self.take(key, dict, required=required)
        return None if values is None else _Table(self.path, self.name(key), values)

    def tables(self, key: str, *, required: bool = True) -> list[_Table]:
        values = self.take(key, list, required=required, default=[])
        return [_Table(self.path, f"{self.name(key)}[{i}]", value) for i, value in enumerate(values)]

    def named(self, key: str, *, required: bool = True) -> dict[str, _Table]:
        values = self.take(key, dict, required=required, default={})
        return {name: _Table(self.path, f"{self.name(key)}.{name}", value) for name, value in values.items()}

    def done(self) -> None:
        unknown = sorted(set(self.values) - self.seen)
        if unknown:
            raise self.fail(unknown[0], f"is unknown; known here: {', '.join(sorted(self.seen))}")


def read_card(path: Path, package: str) -> Method:
    """Read and check one ``card.toml``.

    Args:
        path: the card.
        package: dotted import path of the room it stands in.

    Raises:
        CardError: the file cannot be read, or a field is missing, unknown or wrong.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CardError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"{path}: is no valid TOML: {error}") from error

    card = _Table(path, "", values)
    slug = card.text("slug")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise card.fail("slug", f"must be lower-case words joined by hyphens, got {slug!r}")
    room = path.parent.name
    if slug.replace("-", "_") != room:
        raise card.fail("slug", f"must be that of its folder {room!r}, got {slug!r}")
    family = card.text("family")
    if family != path.parent.parent.name and path.parent.parent.parent.name == "methods":
        raise card.fail("family", f"must be its folder's name {path.parent.parent.name!r}, got {family!r}")
    kinds = card.texts("kinds") or ()
    for kind in kinds:
        if kind not in KINDS:
            raise card.fail("kinds", f"holds the unknown kind {kind!r}; known: {', '.join(KINDS)}")
    exports = card.texts("exports") or ()
    for name in exports:
        if not name.isidentifier() or name.startswith("_"):
            raise card.fail("exports", f"holds {name!r}, which is no public Python name")
    usage = card.table("usage")
    assert usage is not None
    method = Method(
        slug=slug,
        title=card.text("title"),
        summary=card.text("summary"),
        family=family,
        kinds=kinds,
        exports=exports,
        paper=_paper(card),
        usage=usage.text("code"),
        presets={name: _preset(name, table, exports) for name, table in card.named("presets", required=False).items()},
        claim=_claim(card),
        folder=path.parent,
        package=package,
        official=_official(card),
        card=values,
    )
    usage.done()
    card.done()
    return method


def _paper(card: _Table) -> Paper:
    table = card.table("paper")
    assert table is not None
    paper = Paper(
        title=table.text("title"),
        authors=table.texts("authors") or (),
        venue=table.text("venue"),
        year=table.take("year", int),
        arxiv=table.text("arxiv", required=False),
    )
    if not 1900 <= paper.year <= 2100:
        raise table.fail("year", f"must be a year, got {paper.year}")
    table.done()
    return paper


def _official(card: _Table) -> Official | None:
    table = card.table("official", required=False)
    if table is None:
        return None
    official = Official(table.text("repository"), table.text("licence"), table.text("commit", required=False))
    table.done()
    return official


def _preset(name: str, table: _Table, exports: tuple[str, ...]) -> Preset:
    preset = Preset(
        name=name,
        export=table.choice("export", exports),
        arguments=table.take("arguments", dict, required=False, default={}),
        summary=table.text("summary"),
        parameters=table.take("parameters", int, required=False),
        flops=table.take("flops", int, required=False),
    )
    table.done()
    return preset


def _claim(card: _Table) -> Claim:
    table = card.table("claim")
    assert table is not None
    scales = {name: _scale(name, entry) for name, entry in table.named("scales").items()}
    for needed in ("smoke", "laptop"):
        if needed not in scales:
            raise table.fail(f"scales.{needed}", "is missing")
    metrics = {name: _metric(name, entry) for name, entry in table.named("metrics").items()}
    arms = tuple(_arm(entry, tuple(scales)) for entry in table.tables("arms"))
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise table.fail("arms", f"names the arm {name!r} twice")
    for role in ("method", "baseline", "ablation"):
        if not any(arm.role == role for arm in arms):
            raise table.fail("arms", f"has no arm of the role {role!r}")
    criteria = tuple(_criterion(entry, arms, metrics, tuple(scales)) for entry in table.tables("criteria"))
    if not criteria:
        raise table.fail("criteria", "must hold at least one criterion")
    if len({criterion.name for criterion in criteria}) != len(criteria):
        raise table.fail("criteria", "names a criterion twice")
    heard = {control for criterion in criteria for control in criterion.controls}
    for arm in arms:
        if arm.role == "control" and arm.name not in heard:
            raise table.fail("arms", f"has the control {arm.name!r}, which no criterion lists in its controls")
    claim = Claim(
        statement=table.text("statement"),
        source=table.text("source"),
        primary=table.choice("primary", tuple(metrics)),
        arms=arms,
        metrics=metrics,
        criteria=criteria,
        scales=scales,
        history=tuple(_history(entry) for entry in table.tables("history", required=False)),
        findings=tuple(_finding(entry, tuple(scales)) for entry in table.tables("findings", required=False)),
    )
    table.done()
    return claim


def _scale(name: str, table: _Table) -> Scale:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise CardError(f"{table.path}: field {table.where!r} must be named in lower case, digits and underscores")
    scale = Scale(name, table.take("seeds", int), table.text("summary"), table.text("needs", required=False))
    if scale.seeds < 1:
        raise table.fail("seeds", f"must be at least 1, got {scale.seeds}")
    table.done()
    return scale


def _metric(name: str, table: _Table) -> Metric:
    metric = Metric(
        name=name,
        label=table.text("label"),
        unit=table.take("unit", str, required=False, default=""),
        better=table.choice("better", ("higher", "lower")),
    )
    table.done()
    return metric


def _arm(table: _Table, scales: tuple[str, ...]) -> Arm:
    arm = Arm(
        name=table.text("name"),
        role=table.choice("role", ROLES),
        label=table.text("label"),
        summary=table.text("summary"),
        scales=_some_scales(table, scales),
    )
    if not re.fullmatch(r"[A-Za-z0-9_]+", arm.name):
        raise table.fail("name", f"must be letters, digits and underscores, got {arm.name!r}")
    table.done()
    return arm


def _some_scales(table: _Table, scales: tuple[str, ...]) -> tuple[str, ...] | None:
    chosen = table.texts("scales", required=False)
    for name in chosen or ():
        if name not in scales:
            raise table.fail("scales", f"names the unknown scale {name!r}; known: {', '.join(scales)}")
    return chosen


def _criterion(
    table: _Table, arms: tuple[Arm, ...], metrics: Mapping[str, Metric], scales: tuple[str, ...]
) -> Criterion:
    names, known = tuple(arm.name for arm in arms), tuple(metrics)
    roles = {arm.name: arm.role for arm in arms}
    value = table.take("value", (int, float), required=False)
    criterion = Criterion(
        name=table.text("name"),
        statement=table.text("statement"),
        metric=table.choice("metric", known),
        arm=table.choice("arm", names),
        relation=table.choice("relation", ("above", "below")),
        against=table.choice("against", names, required=False),
        against_metric=table.choice("against_metric", known, required=False),
        value=None if value is None else float(value),
        margin=float(table.take("margin", (int, float), required=False, default=0.0)),
        controls=table.texts("controls", required=False) or (),
        scales=_some_scales(table, scales),
    )
    if (criterion.against is None) == (criterion.value is None):
        raise table.fail("against", "and 'value': exactly one of the two must be given")
    if criterion.against_metric is not None and criterion.against is None:
        raise table.fail("against_metric", "needs 'against'")
    for control in criterion.controls:
        if roles.get(control) != "control":
            raise table.fail("controls", f"names {control!r}, which is no arm of the role 'control'")
    table.done()
    return criterion


def _history(table: _Table) -> dict[str, str]:
    entry = {key: table.text(key) for key in ("date", "change", "reason")}
    table.done()
    return entry


def _finding(table: _Table, scales: tuple[str, ...]) -> dict[str, str]:
    entry = {"scale": table.choice("scale", scales), "text": table.text("text")}
    table.done()
    return entry


def _rooms(folder: Path, package: str) -> list[tuple[Path, str]]:
    """(card, package) of the rooms in ``folder``: itself, or its ``<family>/<room>`` folders."""
    if (folder / "card.toml").exists():
        return [(folder / "card.toml", package)]
    cards = sorted(folder.glob("*/*/card.toml"))
    return [(card, f"{package}.{card.parent.parent.name}.{card.parent.name}") for card in cards]


@functools.cache
def load_methods() -> Mapping[str, Method]:
    """All methods by slug, in alphabetical order: Headgate's own and those of installed packages.

    Raises:
        CardError: a card is wrong, or two rooms have one slug.
        HeadgateError: an entry point names a package that is not installed.
    """
    rooms = _rooms(Path(__file__).parent / "methods", "headgate.methods")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            spec = importlib.util.find_spec(entry.value)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise HeadgateError(
                f"the entry point {entry.name!r} of {ENTRY_POINT_GROUP} names no package: {entry.value!r}"
            )
        for location in spec.submodule_search_locations:
            rooms += _rooms(Path(location), entry.value)
    methods: dict[str, Method] = {}
    taken: dict[tuple[str, str], Path] = {}
    for path, package in rooms:
        method = read_card(path, package)
        names = [("slug", method.slug)]
        names += [("exports", name) for name in method.exports] + [("presets", name) for name in method.presets]
        for name in names:
            if name in taken:
                raise CardError(f"{path}: field {name[0]!r} holds {name[1]!r}, which {taken[name]} holds already")
            taken[name] = path
        methods[method.slug] = method
    return dict(sorted(methods.items()))


def find_method(slug: str) -> Method:
    """The method called ``slug``.

    Raises:
        HeadgateError: there is none; the message holds the nearest names.
    """
    methods = load_methods()
    if slug not in methods:
        import difflib

        near = difflib.get_close_matches(slug, methods, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "'headgate list' shows them all"
        raise HeadgateError(f"unknown method {slug!r}; {hint}")
    return methods[slug]


def search_methods(query: str) -> list[Method]:
    """Methods whose card holds every word of ``query``, best first.

    A word in the slug, title or exports weighs more than one in the running text.
    """
    words = query.lower().split()
    ranked: list[tuple[int, str, Method]] = []
    for method in load_methods().values():
        loud = " ".join((method.slug, method.title, method.paper.title, *method.exports, *method.presets)).lower()
        quiet = " ".join(
            (
                method.summary, method.family, *method.kinds, *method.paper.authors, method.claim.statement,
                *(arm.label + " " + arm.summary for arm in method.claim.arms),
                *(metric.label for metric in method.claim.metrics.values()),
                *(preset.summary for preset in method.presets.values()),
            )
        ).lower()  # fmt: skip
        if words and all(word in loud or word in quiet for word in words):
            score = sum(3 * (word in loud) + quiet.count(word) for word in words)
            ranked.append((-score, method.slug, method))
    return [method for _, _, method in sorted(ranked, key=lambda entry: entry[:2])]
