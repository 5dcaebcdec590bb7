"""Every golden file of every method that has a room is put through its check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headgate.catalog import load_methods
from tests.golden.harness import find_check, load_cases, load_golden, shared_folder

FOLDER = shared_folder() / "golden"
ROOMS = sorted(load_methods())
FOLDERS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) if FOLDER.is_dir() else []
FILES = [path for slug in FOLDERS if slug in ROOMS for path in sorted((FOLDER / slug).glob("*.json"))]
HOMELESS = [slug for slug in FOLDERS if slug not in ROOMS]

needs_golden = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no golden files: {FOLDER} is no folder (set HEADGATE_SHARED to the folder above it)"
)


@needs_golden
@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.stem}" for path in FILES])
def test_ours_equals_the_published_code(path: Path, request: pytest.FixtureRequest) -> None:
    golden = load_golden(path)
    check = find_check(golden)
    try:
        check(golden)
    finally:
        summary = {
            "case": f"{golden.slug}/{golden.path.stem}",
            "compared": len(golden.comparisons),
            "worst": max(golden.comparisons, key=lambda c: c.relative_error).__dict__ if golden.comparisons else None,
            "unread": golden.tensors.unread(),
        }
        request.node.user_properties.append(("golden", json.dumps(summary)))
    assert golden.comparisons, f"the check of {golden.slug}/{golden.case} compares nothing"


@needs_golden
@pytest.mark.parametrize("slug", [slug for slug in FOLDERS if slug in ROOMS])
def test_every_check_has_a_file(slug: str) -> None:
    cases = {load_golden(path).case for path in FILES if path.parent.name == slug}
    assert set(load_cases(slug)) <= cases, f"checks without a golden file: {sorted(set(load_cases(slug)) - cases)}"


@needs_golden
def test_every_file_of_tensors_has_its_json() -> None:
    orphans = [
        str(path.relative_to(FOLDER))
        for slug in FOLDERS
        for path in sorted((FOLDER / slug).glob("*.safetensors"))
        if not path.with_suffix(".json").is_file()
    ]
    assert not orphans, f"tensors without a JSON that says what they are: {orphans}"


@needs_golden
def test_every_golden_folder_has_a_room() -> None:
    if HOMELESS:
        pytest.skip(f"no room yet for {len(HOMELESS)} golden folders: {', '.join(HOMELESS)}")
    assert set(FOLDERS) <= set(ROOMS)
