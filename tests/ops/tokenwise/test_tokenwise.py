"""The compiled token-wise operations against their definitions in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headgate.ops import depthwise_conv3x3, log_sigmoid_gate, mix_branches, rms_norm, swiglu
from headgate.ops import tokenwise as tokenwise_module
from headgate.ops.tokenwise import reference

DTYPES = {torch.float32: 1e-6, torch.float64: 1e-14}


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * spread


def _assert_equal(result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(params=[True, False], ids=["clean", "poisoned"])
def fresh_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory as it comes, and filled with NaN."""
    if not request.param:
        empty = torch.empty

        def poisoned(*args: object, **kwargs: object) -> Tensor:
            tensor = empty(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, "empty", poisoned)


def _operations(
    dtype: torch.dtype,
) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[object, ...]]]:
    tokens, head = _normal(3, 37, 96, dtype=dtype, spread=3), _normal(32, dtype=dtype, seed=1)
    other, logits = _normal(3, 37, 96, dtype=dtype, seed=2), _normal(3, 37, 96, dtype=dtype, seed=3, spread=8)
    picture = _normal(2, 5, 7, 48, dtype=dtype, seed=4)
    taps = _normal(48, 1, 3, 3, dtype=dtype, seed=5)
    mixed = (tokens, other, logits, head, head.flip(0), 1e-6)
    return {
        "rms_norm": (rms_norm, reference.rms_norm_reference, (tokens, _normal(96, dtype=dtype, seed=6), 1e-5)),
        "swiglu": (swiglu, reference.swiglu_reference, (tokens,)),
        "gate": (log_sigmoid_gate, reference.log_sigmoid_gate_reference, (logits, 16.0, None)),
        "clamped gate": (log_sigmoid_gate, reference.log_sigmoid_gate_reference, (logits, 2.0, -0.5)),
        "mix": (mix_branches, reference.mix_branches_reference, (*mixed, "identity")),
        "mix with silu": (mix_branches, reference.mix_branches_reference, (*mixed, "silu")),
        "convolution": (depthwise_conv3x3, reference.depthwise_conv3x3_reference, (picture, taps, "identity")),
        "convolution with silu": (depthwise_conv3x3, reference.depthwise_conv3x3_reference, (picture, taps, "silu")),
    }


@pytest.mark.usefixtures("fresh_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _operations(torch.float32))
def test_the_compiled_operation_equals_its_definition(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, definition, arguments = _operations(dtype)[name]
    runs = []
    run = tokenwise_module._run
    monkeypatch.setattr(tokenwise_module, "_run", lambda *args, **kwargs: runs.append(1) or run(*args, **kwargs))
    _assert_equal(operation(*arguments), definition(*arguments), DTYPES[dtype])
    assert runs == [1]


@pytest.mark.parametrize("name", _operations(torch.float32))
def test_with_gradients_the_definition_itself_runs(name: str) -> None:
    operation, definition, arguments = _operations(torch.float64)[name]
    inputs = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
    again = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
    result, expected = operation(*inputs), definition(*again)
    assert torch.equal(result, expected)
    result.sum().backward()
    expected.sum().backward()
    for x, y in zip(inputs, again, strict=True):
        if isinstance(x, Tensor):
            assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("name", _operations(torch.float32))
def test_strided_inputs_and_odd_widths_give_the_same(name: str) -> None:
    operation, definition, arguments = _operations(torch.float32)[name]
    first, *rest = arguments
    assert isinstance(first, Tensor)
    strided = first.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    _assert_equal(operation(strided, *rest), definition(first, *rest), 1e-6)


def test_widths_that_are_no_whole_registers_give_the_same() -> None:
    x, weight = _normal(5, 7, 10), _normal(10, seed=1)
    _assert_equal(rms_norm(x, weight, 1e-5), reference.rms_norm_reference(x, weight, 1e-5), 1e-6)
    _assert_equal(swiglu(x), reference.swiglu_reference(x), 1e-6)
    picture, taps = _normal(1, 3, 3, 10), _normal(10, 1, 3, 3)
    _assert_equal(
        depthwise_conv3x3(picture, taps), reference.depthwise_conv3x3_reference(picture, taps, "identity"), 1e-6
    )


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("columns", [1, 2, 5])
def test_the_convolution_sees_zeros_beyond_every_border(rows: int, columns: int) -> None:
    picture, taps = _normal(2, rows, columns, 16), _normal(16, 1, 3, 3, seed=1)
    _assert_equal(
        depthwise_conv3x3(picture, taps), reference.depthwise_conv3x3_reference(picture, taps, "identity"), 1e-6
    )


def test_gates_stay_exact_for_extreme_logits() -> None:
    logits = torch.tensor([-1e4, -100.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 80.0] * 2)
    result = log_sigmoid_gate(logits)
    expected = torch.nn.functional.logsigmoid(logits.double())
    assert (result - expected).abs().le(2e-7 * expected.abs() + 1e-37).all()


def test_many_tokens_on_two_threads_give_the_same_as_on_one() -> None:
    x, weight = _normal(1000, 64), _normal(64, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = rms_norm(x, weight, 1e-5)
        torch.set_num_threads(2)
        assert torch.equal(rms_norm(x, weight, 1e-5), alone)
    finally:
        torch.set_num_threads(before)


def test_the_convolution_is_counted_by_the_flop_counter() -> None:
    with FlopCounterMode(display=False) as counter:
        depthwise_conv3x3(_normal(2, 5, 7, 16), _normal(16, 1, 3, 3))
    assert counter.get_total_flops() == 2 * 9 * 2 * 5 * 7 * 16


def test_the_convolution_passes_pytorchs_check_of_operators() -> None:
    result = torch.library.opcheck(
        torch.ops.headgate.depthwise_conv3x3, (_normal(2, 4, 3, 16), _normal(16, 1, 3, 3), "silu")
    )
    assert set(result.values()) == {"SUCCESS"}


def test_a_compiled_function_gives_the_same() -> None:
    def both(x: Tensor, weight: Tensor) -> Tensor:
        return swiglu(rms_norm(x, weight, 1e-5))

    x, weight = _normal(4, 32), _normal(32, seed=1)
    _assert_equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x, weight), both(x, weight), 1e-6)


def test_lower_precision_and_empty_inputs_take_the_definition() -> None:
    x = _normal(3, 32).bfloat16()
    assert torch.equal(swiglu(x), reference.swiglu_reference(x))
    assert swiglu(torch.zeros(0, 32)).shape == (0, 16)
    assert log_sigmoid_gate(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm(torch.zeros(2, 16), torch.ones(8), 1e-5), ValueError, "weight must have dim=16"),
        (lambda: rms_norm(torch.zeros(2, 16), torch.ones(16), 0.0), ValueError, "eps must be positive"),
        (
            lambda: rms_norm(torch.zeros(2, 16, dtype=torch.int64), torch.ones(16), 1e-5),
            TypeError,
            "x must be floating",
        ),
        (lambda: swiglu(torch.zeros(2, 15)), ValueError, "even last axis"),
        (lambda: log_sigmoid_gate(torch.zeros(2, 16), 0.0), ValueError, "normalizer must be positive"),
        (lambda: log_sigmoid_gate(torch.zeros(2, 16), 1.0, 0.0), ValueError, "clamp_min must be below zero"),
        (
            lambda: mix_branches(
                torch.zeros(2, 16), torch.zeros(2, 8), torch.zeros(2, 16), torch.ones(8), torch.ones(8), 1e-6
            ),
            ValueError,
            "local must have the shape of scanned",
        ),
        (
            lambda: mix_branches(*[torch.zeros(2, 16)] * 3, torch.ones(5), torch.ones(5), 1e-6),
            ValueError,
            "must divide dim",
        ),
        (
            lambda: depthwise_conv3x3(torch.zeros(1, 2, 2, 16), torch.zeros(8, 1, 3, 3)),
            ValueError,
            "weight must have dim=16",
        ),
        (
            lambda: depthwise_conv3x3(torch.zeros(1, 2, 2, 16), torch.zeros(16, 1, 3, 3), "relu"),
            ValueError,
            "activation must be one of",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
