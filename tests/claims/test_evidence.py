from __future__ import annotations

import pytest

import toy
from headgate.catalog import find_method, load_methods
from headgate.claims import claim_status, find_evidence, reproduce
from headgate.claims.evidence import Evidence
from headgate.claims.fingerprint import method_fingerprint, quick_fingerprint, shared_fingerprint
from headgate.errors import ClaimError


@pytest.fixture
def made(lab, tmp_path):
    out = tmp_path / "runs"
    (evidence,) = reproduce([find_method("toy-gate")], out=out, jobs=1)
    return evidence, out


def test_evidence_comes_back_from_its_file(made):
    evidence, out = made
    loaded = Evidence.read(out / "toy-gate-laptop.json")
    assert loaded.to_dict() == evidence.to_dict()
    assert loaded.values("toy", "score") == evidence.values("toy", "score")
    assert loaded.curves("toy", "score over steps")[0].log_x
    assert loaded.criteria[0].effects.keys() == {0, 1, 2}


def test_status_follows_evidence_and_code(made, lab):
    _, out = made
    method = find_method("toy-gate")
    assert claim_status(method, folders=[out]) == "reproduced"
    assert claim_status(method, "smoke", [out]) == "not measured"
    claim = method.folder / "claim.py"
    text = claim.read_text()
    claim.write_text(text + "\n# a comment changes nothing\n")
    assert claim_status(method, folders=[out]) == "reproduced"
    claim.write_text(text.replace('"toy": 0.9', '"toy": 0.7'))
    from headgate.claims import fingerprint

    fingerprint._parsed.cache_clear()
    fingerprint._tree.cache_clear()
    assert claim_status(method, folders=[out]) == "stale"


def test_moved_goalposts_make_evidence_stale(made, lab):
    _, out = made
    method = find_method("toy-gate")
    card = method.folder / "card.toml"
    card.write_text(toy.CARD.replace("margin = 0.2", "margin = 0.1"))
    load_methods.cache_clear()
    assert claim_status(find_method("toy-gate"), folders=[out]) == "stale"
    card.write_text(toy.CARD.replace("The toy beats nothing at all.", "The toy beats nothing."))
    load_methods.cache_clear()
    assert claim_status(find_method("toy-gate"), folders=[out]) == "reproduced"


def test_the_shared_fingerprint_follows_imports_to_the_floors(lab):
    method = find_method("toy-gate")
    before = shared_fingerprint(method)
    claim = method.folder / "claim.py"
    claim.write_text(claim.read_text() + "\nimport headgate.presets\n")
    from headgate.claims import fingerprint

    fingerprint._parsed.cache_clear()
    fingerprint._imports.cache_clear()
    assert shared_fingerprint(method) != before


def test_fingerprints_do_not_depend_on_contract_cases(lab):
    method = find_method("toy-gate")
    before = (quick_fingerprint(method), method_fingerprint(method))
    (method.folder / "contract.py").write_text("CASES = {}\n")
    assert (quick_fingerprint(method), method_fingerprint(method)) == before


def test_a_broken_evidence_file_is_one_clear_line(made):
    _, out = made
    path = out / "toy-gate-laptop.json"
    for content in ("", "[]", "{}", '{"format": 99}', path.read_text()[:-200]):
        path.write_text(content)
        with pytest.raises(ClaimError, match="is no evidence file"):
            find_evidence("toy-gate", "laptop", [out])
