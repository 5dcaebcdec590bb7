"""Folders of data sets that have to be supplied."""

from __future__ import annotations

from pathlib import Path

import pytest

from headgate.data.folders import data_folder
from headgate.errors import DataError


def test_a_set_s_own_variable_goes_before_the_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "data" / "cifar100").mkdir(parents=True)
    monkeypatch.delenv("HEADGATE_CIFAR100", raising=False)
    monkeypatch.setenv("HEADGATE_SHARED", str(tmp_path))
    assert data_folder("cifar100") == tmp_path / "data" / "cifar100"
    monkeypatch.setenv("HEADGATE_CIFAR100", str(tmp_path / "own"))
    assert data_folder("cifar100") == tmp_path / "own"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADGATE_CIFAR100", raising=False)
    monkeypatch.delenv("HEADGATE_SHARED", raising=False)
    with pytest.raises(DataError, match=r"set HEADGATE_CIFAR100 to its folder.*data/cifar100"):
        data_folder("cifar100")
    monkeypatch.setenv("HEADGATE_SHARED", str(tmp_path))
    with pytest.raises(DataError, match="cifar100 is no folder"):
        data_folder("cifar100")
