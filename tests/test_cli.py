from __future__ import annotations

import pytest

import toy
from headgate.claims import Evidence


@pytest.fixture
def lab(tmp_path):
    toy.write_toy(tmp_path)
    return tmp_path


def check_refused(result, *words):
    """One clear line on standard error, no traceback, a status that is not zero."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "toygate"], ["unknown method 'toygate'", "did you mean toy-gate"]),
        (["reproduce", "nothing-like-it"], ["unknown method"]),
        (["reproduce"], ["name the methods"]),
        (["reproduce", "toy-gate", "--all"], ["name the methods"]),
        (["reproduce", "toy-gate", "--scale", "huge"], ["unknown scale 'huge'", "smoke, laptop"]),
        (["reproduce", "toy-gate", "--seeds", "0"], ["at least 1"]),
        (["reproduce", "toy-gate", "--jobs", "1000"], ["jobs × threads", "1000"]),
        (["reproduce", "toy-gate", "--jobs", "0"], ["jobs × threads"]),
        (["reproduce", "toy-gate", "--threads", "1000"], ["threads must lie"]),
        (["reproduce", "toy-gate", "--out", "occupied/runs"], ["cannot write to the run folder"]),
        (["reproduce", "toy-gate", "--out", "/proc/headgate"], ["cannot write to the run folder"]),
        (["list", "--family", "sports"], ["unknown family 'sports'", "toys"]),
        (["list", "--kind", "thing"], ["unknown kind 'thing'", "loss"]),
        (["search", "unheardof"], ["no method's card holds"]),
    ],
)
def test_bad_input_is_one_clear_line(lab, arguments, words):
    (lab / "occupied").write_text("a file where a folder should be")
    check_refused(toy.headgate(lab, *arguments), *words)


@pytest.mark.parametrize("command", [["list"], ["show", "toy-gate"], ["reproduce", "toy-gate"], ["search", "toy"]])
def test_a_broken_card_is_one_clear_line(lab, command):
    card = lab / "toy_lab" / "methods" / "toys" / "toy_gate" / "card.toml"
    card.write_text(toy.CARD.replace('venue = "Journal of Toys"\n', ""))
    check_refused(toy.headgate(lab, *command), str(card), "'paper.venue' is missing")


def test_a_broken_evidence_file_is_one_clear_line(lab):
    (lab / "runs").mkdir()
    (lab / "runs" / "toy-gate-laptop.json").write_text('{"format": 1')
    check_refused(toy.headgate(lab, "list"), "toy-gate-laptop.json is no evidence file")


def test_an_unknown_arm_is_reported_as_a_failed_cell_and_loses_nothing(lab):
    card = lab / "toy_lab" / "methods" / "toys" / "toy_gate" / "card.toml"
    card.write_text(toy.CARD.replace('name = "shut"', 'name = "open"').replace('arm = "shut"', 'arm = "open"'))
    result = toy.headgate(lab, "reproduce", "toy-gate")
    assert result.returncode == 2
    assert "unknown arm 'open'" in result.stdout
    evidence = Evidence.read(lab / "runs" / "toy-gate-laptop.json")
    assert len(evidence.cells) == 6


def test_a_full_disk_is_one_clear_line_and_what_was_finished_is_kept(lab):
    result = toy.headgate(lab, "reproduce", "toy-gate", "--jobs", "1", TOY_FULL_DISK="nothing 1")
    assert result.returncode == 2
    assert "No space left on device; make room" in result.stderr
    assert "Traceback" not in result.stderr
    cells = lab / "runs" / "cells" / "toy-gate-laptop"
    kept = sorted(path.name for path in cells.iterdir())
    assert kept == ["nothing-seed0.json", "shut-seed0.json", "toy-seed0.json", "toy-seed1.json"]
    log = lab / "log"
    assert toy.headgate(lab, "reproduce", "toy-gate", TOY_LOG=str(log)).returncode == 0
    assert len(log.read_text().splitlines()) == 9 - 4


def test_list_shows_methods_with_their_status(lab):
    before = toy.headgate(lab, "list")
    assert before.returncode == 0
    assert "toy-gate" in before.stdout
    assert "– not measured" in before.stdout
    toy.headgate(lab, "reproduce", "toy-gate")
    assert "✔ reproduced" in toy.headgate(lab, "list", "--family", "toys").stdout
    assert "toy-gate" in toy.headgate(lab, "list", "--kind", "gate").stdout
    assert "toy-gate" not in toy.headgate(lab, "list", "--kind", "loss").stdout
    claim = lab / "toy_lab" / "methods" / "toys" / "toy_gate" / "claim.py"
    claim.write_text(claim.read_text().replace("0.9", "0.91"))
    assert "… stale" in toy.headgate(lab, "list", "--family", "toys").stdout


def test_show_tells_everything_about_a_method(lab):
    toy.headgate(lab, "reproduce", "toy-gate")
    shown = toy.headgate(lab, "show", "toy-gate").stdout
    for expected in (
        "On toys", "Ada Lovelace", "ToyGate", "toy_two", "gate = 2", "The toy beats nothing at all.",
        "score(toy) > score(nothing) + 20.0 %", "score(shut) < score(toy)", "The gate stays shut.",
        "✔ reproduced", "@inproceedings{lovelace1950toygate,",
    ):  # fmt: skip
        assert expected in shown, expected
    assert toy.headgate(lab, "show", "toy-gate", "--bibtex").stdout.startswith("@inproceedings{")


def test_reproducing_several_claims_ends_with_a_table_of_verdicts(lab):
    other = lab / "other"
    card = toy.CARD.replace("toy-gate", "toy-twin").replace("ToyGate", "ToyTwin").replace("toy_two", "toy_three")
    room = toy.write_toy(other, card=card, package="twin_lab")
    (room / "__init__.py").write_text(toy.ROOM.replace("ToyGate", "ToyTwin"))
    room.rename(room.parent / "toy_twin")
    for path in other.iterdir():
        path.rename(lab / path.name)
    result = toy.headgate(lab, "reproduce", "toy-gate", "toy-twin")
    assert result.returncode == 0, result.stderr
    summary = result.stdout.rsplit("verdicts", 1)[1]
    assert [line.split()[0] for line in summary.splitlines() if line.startswith("toy")] == ["toy-gate", "toy-twin"]
    assert summary.count("2 of 2") == 2


def test_broken_data_is_one_clear_line_and_finished_evidence_stays(lab):
    toy.headgate(lab, "reproduce", "toy-gate")
    before = (lab / "runs" / "toy-gate-laptop.json").read_bytes()
    claim = lab / "toy_lab" / "methods" / "toys" / "toy_gate" / "claim.py"
    claim.write_text(claim.read_text().replace("0.9", "0.91"))
    (lab / "latin.txt").write_bytes("naïve".encode("latin-1"))
    result = toy.headgate(lab, "reproduce", "toy-gate", "--jobs", "1", TOY_DATA=str(lab / "latin.txt"))
    check_refused(result, "9 cells failed", "latin.txt", "UTF-8")
    assert (lab / "runs" / "toy-gate-laptop.json").read_bytes() == before
