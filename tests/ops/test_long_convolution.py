"""The long convolution: the FFT against the definition, and the definition against numbers by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from headgate.ops import long_convolution


def draw(batch: int, length: int, dim: int, taps: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length * 100 + taps)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((batch, length, dim), (dim, taps), (dim,))
    )


@pytest.mark.parametrize("backend", ["fft", "reference"])
def test_a_small_case_by_hand(backend: str) -> None:
    u = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [0.0, -1.0]]])
    kernel = torch.tensor([[2.0, 1.0, 5.0], [1.0, -1.0, 3.0]])
    y = long_convolution(u, kernel, torch.tensor([10.0, 0.0]), backend=backend)
    # channel 0: 2·1, 2·3 + 1·1, 2·0 + 1·3 + 5·1, each plus 10·u; channel 1: 2, -2 + 0, -1 - 0 + 6
    torch.testing.assert_close(y, torch.tensor([[[12.0, 2.0], [37.0, -2.0], [8.0, 5.0]]]))


@pytest.mark.parametrize(("length", "taps"), list(itertools.product((1, 2, 7, 33, 64), (1, 3, 64, 100))))
def test_the_fft_gives_the_values_and_gradients_of_the_definition(length: int, taps: int) -> None:
    inputs = draw(2, length, 3, taps)
    weight = torch.randn(2, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for backend in ("fft", "reference"):
        y = long_convolution(*inputs, backend=backend)
        results.append((y, *torch.autograd.grad((y * weight).sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_second_derivatives_are_right() -> None:
    u, kernel, skip = draw(1, 4, 2, 3)
    assert torch.autograd.gradgradcheck(lambda u, k, s: long_convolution(u, k, s), (u, kernel, skip))


def test_the_future_never_reaches_the_past() -> None:
    u, kernel, skip = (part.detach() for part in draw(1, 16, 4, 40))
    changed = u.clone()
    changed[:, 9:] = 1e6
    before, after = long_convolution(u, kernel, skip), long_convolution(changed, kernel, skip)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-8)
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_a_unit_kernel_shifts() -> None:
    u, _, _ = draw(2, 10, 3, 1)
    kernel = torch.zeros(3, 5, dtype=torch.float64)
    kernel[:, 4] = 1
    expected = torch.cat((torch.zeros(2, 4, 3, dtype=torch.float64), u[:, :-4]), dim=1)
    torch.testing.assert_close(long_convolution(u, kernel), expected)


@pytest.mark.parametrize("backend", ["fft", "reference"])
def test_an_empty_sequence_stays_empty(backend: str) -> None:
    assert long_convolution(torch.zeros(2, 0, 3), torch.ones(3, 4), torch.ones(3), backend=backend).shape == (2, 0, 3)


def test_half_precision_is_summed_in_float32() -> None:
    u, kernel, skip = (part.detach() for part in draw(2, 300, 3, 300, torch.bfloat16))
    y = long_convolution(u, kernel, skip)
    expected = long_convolution(u.double(), kernel.double(), skip.double(), backend="reference")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-4)


def test_it_can_be_compiled_as_one_graph() -> None:
    u, kernel, skip = (part.detach() for part in draw(2, 12, 3, 12, torch.float32))
    expected = long_convolution(u, kernel, skip)
    compiled = torch.compile(long_convolution, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u, kernel, skip), expected)


@pytest.mark.parametrize(
    ("u", "kernel", "skip", "error", "match"),
    [
        ((2, 5), (3, 4), (3,), ValueError, "u must have shape"),
        ((2, 5, 3), (2, 4), (3,), ValueError, "kernel must have dim=3"),
        ((2, 5, 3), (3, 0), (3,), ValueError, "at least one tap"),
        ((2, 5, 3), (3, 4), (4,), ValueError, "skip must have dim=3"),
    ],
)
def test_wrong_shapes_are_refused(
    u: tuple[int, ...], kernel: tuple[int, ...], skip: tuple[int, ...], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        long_convolution(torch.zeros(u), torch.zeros(kernel), torch.zeros(skip))


def test_integers_and_unknown_backends_are_refused() -> None:
    with pytest.raises(TypeError, match="u must be floating point"):
        long_convolution(torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="backend must be one of"):
        long_convolution(torch.zeros(1, 2, 3), torch.zeros(3, 2), backend="magic")  # type: ignore[arg-type]
