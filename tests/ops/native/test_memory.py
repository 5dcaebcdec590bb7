"""Memory of large results: kept when it is free, never while anyone holds it, and within a bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from headgate.ops import gated_linear_attention
from headgate.ops.native import memory

LARGE = (33, 1 << 18)  # 33 MiB of float32


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HEADGATE_KEEP_MIB", raising=False)
    memory.release()
    yield
    memory.release()


def test_a_freed_block_serves_the_next_result_of_its_size() -> None:
    first = memory.new_result(LARGE, torch.float32)
    address, size = first.data_ptr(), first.numel() * 4
    assert memory.kept_bytes() == 0
    del first
    assert memory.kept_bytes() == size
    other = memory.new_result((34, 1 << 18), torch.float32)
    assert other.data_ptr() != address
    assert memory.kept_bytes() == size
    second = memory.new_result((1 << 17, 33), torch.float64)
    assert second.data_ptr() == address
    assert memory.kept_bytes() == 0


def test_shape_dtype_and_layout_are_those_asked_for() -> None:
    result = memory.new_result((3, 5, 1 << 20), torch.bfloat16)
    assert (result.shape, result.dtype) == ((3, 5, 1 << 20), torch.bfloat16)
    assert result.is_contiguous()
    assert not result.requires_grad
    result = memory.new_result((2, 0, 7), torch.float64)
    assert (result.shape, result.dtype) == ((2, 0, 7), torch.float64)


@pytest.mark.parametrize("hold", ["view", "detached", "numpy", "storage"])
def test_a_block_that_anyone_holds_is_not_given_away(hold: str) -> None:
    result = memory.new_result(LARGE, torch.float32).fill_(7)
    address = result.data_ptr()
    held = {
        "view": lambda: result[3:4, ::2],
        "detached": lambda: result.detach(),
        "numpy": lambda: result.numpy(),
        "storage": lambda: result.untyped_storage(),
    }[hold]()
    del result
    assert memory.kept_bytes() == 0
    assert memory.new_result(LARGE, torch.float32).fill_(1).data_ptr() != address
    if isinstance(held, torch.UntypedStorage):
        held = torch.empty(0).set_(held)
    assert (torch.as_tensor(held) == 7).all()


def test_what_autograd_saved_keeps_its_values() -> None:
    leaf = torch.ones(1, requires_grad=True)
    result = memory.new_result(LARGE, torch.float32).fill_(3)
    product = (result * leaf).sum()
    del result
    memory.new_result(LARGE, torch.float32).fill_(0)
    product.backward()
    assert leaf.grad is not None
    assert leaf.grad.item() == 3 * LARGE[0] * LARGE[1]


def test_no_more_than_the_bound_is_kept_and_the_latest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_KEEP_MIB", "70")
    blocks = [memory.new_result(LARGE, torch.float32) for _ in range(3)]
    addresses = [block.data_ptr() for block in blocks]
    while blocks:
        blocks.pop(0)
    assert memory.kept_bytes() == 66 << 20
    again = [memory.new_result(LARGE, torch.float32) for _ in range(2)]
    assert [block.data_ptr() for block in again] == [addresses[2], addresses[1]]
    memory.release()
    assert memory.kept_bytes() == 0


@pytest.mark.parametrize("bound", ["0", "32"])
def test_what_is_over_the_bound_is_not_kept(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_KEEP_MIB", bound)
    memory.new_result(LARGE, torch.float32)
    assert memory.kept_bytes() == 0


@pytest.mark.parametrize("bound", ["-1", "much", "1.5", ""])
def test_a_bound_that_is_no_whole_number_is_refused(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_KEEP_MIB", bound)
    with pytest.raises(ValueError, match=r"HEADGATE_KEEP_MIB must be a whole number of MiB"):
        memory.new_result(LARGE, torch.float32)


def test_a_small_result_is_the_c_librarys_own() -> None:
    memory.new_result((1 << 20,), torch.float32)
    assert memory.kept_bytes() == 0


def test_results_of_the_op_do_not_change_when_the_next_is_computed() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2100, 1, 16, generator=generator) for _ in range(2))
    v = torch.randn(1, 2100, 1, 4096, generator=generator)
    gate = -torch.rand(1, 2100, 1, 16, generator=generator)
    first = gated_linear_attention(q, k, v, gate, backend="native").output
    assert first.numel() * 4 > 32 << 20
    copy = first.clone()
    second = gated_linear_attention(q, k, 2 * v, gate, backend="native").output
    assert torch.equal(first, copy)
    torch.testing.assert_close(second, 2 * first)
    del second
    assert memory.kept_bytes() == first.numel() * 4
    third = gated_linear_attention(q, k, v, gate, backend="native").output
    assert memory.kept_bytes() == 0
    assert torch.equal(third, first)
