"""Workers on several threads, with and without PyTorch's OpenMP pool, and memory in large pages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from headgate.ops import gated_linear_attention
from headgate.ops.native import memory, threads


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, gate = (torch.randn(2, 70, 3, 16, generator=generator) for _ in range(4))
    return q, k, v, -gate.abs()


@pytest.mark.usefixtures("two_threads")
def test_without_an_openmp_pool_pythons_threads_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gated_linear_attention(*_inputs(), backend="native").output
    calls = []
    pool = threads._pool(2)
    submit = pool.submit
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    monkeypatch.setattr(pool, "submit", lambda *args: calls.append(1) or submit(*args))
    assert torch.equal(gated_linear_attention(*_inputs(), backend="native").output, expected)
    assert calls == [1]


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_does_not_change_a_result_that_is_cut_the_same_way() -> None:
    expected = gated_linear_attention(*_inputs(), backend="native").output
    torch.set_num_threads(1)
    torch.testing.assert_close(gated_linear_attention(*_inputs(), backend="native").output, expected, rtol=0, atol=1e-6)


def test_the_digest_follows_the_sources(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    threads.sources_digest.cache_clear()
    first = threads.sources_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    threads.sources_digest.cache_clear()
    second = threads.sources_digest(tmp_path)
    threads.sources_digest.cache_clear()
    assert first != second
    assert len(first) == len(hashlib.sha256().hexdigest())


def test_large_pages_are_asked_for_inside_large_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(memory, "_advise", lambda: lambda start, length, advice: asked.append((start, length)) or 0)
    memory.ask_for_huge_pages(torch.empty(1 << 19))
    assert asked == []
    large = torch.empty(9 << 20)
    memory.ask_for_huge_pages(large)
    ((start, length),) = asked
    assert start % (2 << 20) == length % (2 << 20) == 0
    assert start >= large.data_ptr()
    assert start + length <= large.data_ptr() + 4 * large.numel()
