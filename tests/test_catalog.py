from __future__ import annotations

import sys

import pytest

import headgate
import toy
from headgate import catalog
from headgate.catalog import load_methods, read_card, search_methods
from headgate.errors import CardError, HeadgateError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The toy package, installed for this process."""
    room = toy.write_toy(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    load_methods.cache_clear()
    yield room
    load_methods.cache_clear()
    for name in [name for name in sys.modules if name.startswith("toy_lab")]:
        del sys.modules[name]


def broken(tmp_path, old: str, new: str):
    assert toy.CARD.count(old) >= 1, old
    room = toy.write_toy(tmp_path, card=toy.CARD.replace(old, new, 1))
    return room / "card.toml"


def test_a_card_is_read_field_by_field(tmp_path):
    method = read_card(toy.write_toy(tmp_path) / "card.toml", "toy_lab.methods.toys.toy_gate")
    assert (method.slug, method.family, method.kinds) == ("toy-gate", "toys", ("gate", "layer"))
    assert method.paper.authors == ("Ada Lovelace", "Alan Turing")
    assert method.presets["toy_two"].parameters == 2
    assert [arm.role for arm in method.claim.arms] == ["method", "baseline", "ablation"]
    assert method.claim.criteria[0].margin == 0.2
    assert method.claim.scales["laptop"].seeds == 3
    assert method.claim.metrics["score"].unit == "%"


@pytest.mark.parametrize(
    ("old", "new", "field", "problem"),
    [
        ('slug = "toy-gate"\n', "", "slug", "is missing"),
        ('slug = "toy-gate"', 'slug = "Toy Gate"', "slug", "lower-case"),
        ('slug = "toy-gate"', 'slug = "other"', "slug", "folder"),
        ('family = "toys"', 'family = "games"', "family", "folder"),
        ('kinds = ["gate", "layer"]', 'kinds = ["thing"]', "kinds", "unknown kind 'thing'"),
        ('kinds = ["gate", "layer"]', "kinds = []", "kinds", "at least 1"),
        ('kinds = ["gate", "layer"]', 'kinds = ["gate", "gate"]', "kinds", "twice"),
        ('exports = ["ToyGate"]', 'exports = ["_Toy"]', "exports", "no public Python name"),
        ('exports = ["ToyGate"]', 'exports = "ToyGate"', "exports", "must be list, got str"),
        ("year = 1950", 'year = "1950"', "paper.year", "must be int, got str"),
        ("year = 1950", "year = 50", "paper.year", "must be a year"),
        ("year = 1950", "year = true", "paper.year", "must be int, got bool"),
        ('venue = "Journal of Toys"', 'venue = ""', "paper.venue", "must not be empty"),
        ('venue = "Journal of Toys"', 'venue = "x"\nvolume = 3', "paper.volume", "is unknown"),
        ('export = "ToyGate"', 'export = "Gone"', "presets.toy_two.export", "must be one of 'ToyGate'"),
        ('primary = "score"', 'primary = "speed"', "claim.primary", "must be one of 'score'"),
        ('role = "baseline"', 'role = "rival"', "claim.arms[1].role", "must be one of"),
        ('role = "baseline"', 'role = "method"', "claim.arms", "no arm of the role 'baseline'"),
        ('role = "ablation"', 'role = "control"', "claim.arms", "no arm of the role 'ablation'"),
        ('name = "nothing"', 'name = "toy"', "claim.arms", "twice"),
        ('better = "higher"', 'better = "more"', "claim.metrics.score.better", "must be one of"),
        ('against = "nothing"', 'against = "nobody"', "claim.criteria[0].against", "must be one of"),
        ('against = "nothing"', 'against = "nothing"\nvalue = 0.5', "claim.criteria[0].against", "exactly one"),
        ('relation = "above"', 'relation = "over"', "claim.criteria[0].relation", "must be one of"),
        ("margin = 0.2", 'margin = 0.2\ncontrols = ["nothing"]', "claim.criteria[0].controls", "role 'control'"),
        ("margin = 0.2", 'margin = 0.2\nscales = ["huge"]', "claim.criteria[0].scales", "unknown scale 'huge'"),
        ("seeds = 3", "seeds = 0", "claim.scales.laptop.seeds", "at least 1"),
        ("[claim.scales.smoke]", "[claim.scales.tiny]", "claim.scales.smoke", "is missing"),
        ('scale = "laptop"', 'scale = "huge"', "claim.findings[0].scale", "must be one of"),
        ("[usage]\n", "[usage]\nlanguage = 'python'\n", "usage.language", "is unknown"),
    ],
)
def test_a_wrong_or_missing_field_is_an_error_that_names_file_and_field(tmp_path, old, new, field, problem):
    path = broken(tmp_path, old, new)
    with pytest.raises(CardError) as error:
        read_card(path, "x")
    message = str(error.value)
    assert str(path) in message
    assert f"'{field}'" in message
    assert problem in message
    assert "\n" not in message


def test_a_control_that_no_criterion_hears_is_an_error(tmp_path):
    extra = (
        '[[claim.arms]]\nname = "wide"\nrole = "control"\nlabel = "Wide"\nsummary = "Wide."\n\n[claim.metrics.score]'
    )
    path = broken(tmp_path, "[claim.metrics.score]", extra)
    with pytest.raises(CardError, match="the control 'wide', which no criterion lists"):
        read_card(path, "x")


@pytest.mark.parametrize("content", [b"slug = ", b"\xff\xfe", b"slug = 1\nslug = 2"])
def test_a_card_that_is_no_toml_is_named(tmp_path, content):
    path = tmp_path / "card.toml"
    path.write_bytes(content)
    with pytest.raises(CardError, match=r"card\.toml: is no valid TOML"):
        read_card(path, "x")


def test_methods_of_another_package_show_up_everywhere(installed):
    assert load_methods()["toy-gate"].package == "toy_lab.methods.toys.toy_gate"
    assert headgate.ToyGate.__name__ == "ToyGate"
    assert "ToyGate" in dir(headgate)
    assert headgate.list_models("toy*") == ["toy_two"]
    assert headgate.create_model("toy_two").scale.shape == (2,)
    assert headgate.create_model("toy_two", dim=5).scale.shape == (5,)
    assert [method.slug for method in search_methods("toy turing")] == ["toy-gate"]


def test_two_rooms_must_not_share_a_name(installed, tmp_path, monkeypatch):
    other = tmp_path / "other"
    toy.write_toy(other, package="second_lab")
    monkeypatch.syspath_prepend(other)
    load_methods.cache_clear()
    with pytest.raises(CardError, match=r"field 'slug' holds 'toy-gate'"):
        load_methods()


def test_an_entry_point_that_names_no_package_is_reported(installed, tmp_path):
    (tmp_path / "toy_lab-0.1.dist-info" / "entry_points.txt").write_text("[headgate.methods]\ngone = toy_lab.gone\n")
    load_methods.cache_clear()
    with pytest.raises(HeadgateError, match=r"names no package: 'toy_lab\.gone'"):
        load_methods()


def test_an_unknown_method_is_answered_with_the_nearest_name(installed):
    with pytest.raises(HeadgateError, match="did you mean toy-gate"):
        catalog.find_method("toygate")


def test_an_unknown_preset_or_name_is_an_error():
    with pytest.raises(HeadgateError, match="unknown preset 'nope'"):
        headgate.create_model("nope")
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        headgate.Nope  # noqa: B018


def test_search_needs_every_word_and_puts_names_first(installed):
    assert search_methods("toy unheard") == []
    assert search_methods("") == []


def test_bibtex_holds_the_paper(installed):
    entry = load_methods()["toy-gate"].bibtex()
    assert entry.startswith("@inproceedings{lovelace1950toygate,")
    assert "author = {Ada Lovelace and Alan Turing}" in entry
    assert entry.count("{") == entry.count("}")


def test_every_export_of_every_method_can_be_imported_from_the_top():
    load_methods.cache_clear()
    for method in load_methods().values():
        for name in method.exports:
            assert getattr(headgate, name) is not None
