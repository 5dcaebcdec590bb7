from __future__ import annotations

import errno
import os

import pytest

from headgate.errors import HeadgateError, MissingExtraError
from headgate.files import atomic_path, write_text


def test_a_file_is_written_whole_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "straße")
    assert path.read_text(encoding="utf-8") == "straße"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.txt"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "b.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="boom"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("boom")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.txt"]


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "b.txt"
    write_text(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HeadgateError, match=r"cannot write .*No space left on device; make room"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.txt"]


def test_a_missing_extra_names_the_command_and_survives_a_process_boundary():
    import pickle

    error = pickle.loads(pickle.dumps(MissingExtraError("faiss", "retrieval", "an HNSW index")))
    assert "pip install 'headgate[retrieval]'" in str(error)
    assert error.package == "faiss"
