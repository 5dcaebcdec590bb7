"""Autograd, torch.compile, torch.export, autocast, the meta device and FLOP counters take the op as one of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from headgate.ops import bidirectional_gated_linear_attention, gated_linear_attention
from tests.ops.gated_linear_attention.cases import BACKENDS, assert_close, make_case

each_backend = pytest.mark.parametrize("backend", BACKENDS)
BOUNDS = (0, 4, 4, 13, 21)


def tensors(*, packed: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v, log_gate, initial_state."""
    case = make_case(21, 3, 4, batch=1 if packed else 2, bounds=BOUNDS if packed else None, seed=seed).to(dtype)
    assert case.initial_state is not None
    return case.q, case.k, case.v, case.log_gate, case.initial_state


def bounds(packed: bool) -> Tensor | None:
    return torch.tensor(BOUNDS) if packed else None


class TwoLayers(nn.Module):
    """The op used twice: the second scan goes back over what the first one gave, from its state."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "return_state": True, "backend": self.backend}
        first, after = gated_linear_attention(q, k, v, log_gate, initial_state=state, **options)
        second, last = gated_linear_attention(q, k, first, log_gate, initial_state=after, reverse=True, **options)
        assert last is not None
        return second + v, last


class BothWays(nn.Module):
    """The two-way op, with gates of one tensor."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        output = bidirectional_gated_linear_attention(
            q, k, v, log_gate, log_gate.flip(1), cu_seqlens=cu_seqlens, backend=self.backend
        )
        return output, state + 1


def outputs_and_gradients(run: Callable[..., Any], inputs: tuple[Tensor, ...], *rest: Any) -> list[Tensor]:
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    output, state = run(*inputs, *rest)
    loss = output.square().sum() + (state * torch.linspace(-1, 1, state.numel()).view_as(state)).sum()
    return [output.detach(), state.detach(), *torch.autograd.grad(loss, inputs)]


def check_same(actual: list[Tensor], reference: list[Tensor], tolerance: float = 1e-4) -> None:
    names = ("output", "state", "dq", "dk", "dv", "dlog_gate", "dinitial_state")
    for name, a, b in zip(names, actual, reference, strict=True):
        assert_close(name, a, b, tolerance)


@each_backend
@pytest.mark.parametrize("packed", [False, True])
def test_the_op_may_stand_twice_in_one_graph(backend: str, packed: bool) -> None:
    wide = tensors(packed=packed, dtype=torch.float64)
    exact = outputs_and_gradients(TwoLayers("reference"), wide, bounds(packed))
    check_same(outputs_and_gradients(TwoLayers(backend), tensors(packed=packed), bounds(packed)), exact)


@each_backend
def test_the_same_tensor_may_be_every_input(backend: str) -> None:
    def gradient(x: Tensor, backend: str) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(gated_linear_attention(x, x, x, x, backend=backend).output.square().sum(), x)[0]

    x = -tensors()[0].abs()
    assert_close("gradient", gradient(x, backend), gradient(x.double(), "reference"), 1e-4)


@each_backend
@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_may_be_asked_for_alone(backend: str, wanted: int) -> None:
    def gradient(inputs: tuple[Tensor, ...], backend: str) -> Tensor:
        q, k, v, log_gate, state = (x.requires_grad_(i == wanted) for i, x in enumerate(inputs))
        output, last = gated_linear_attention(
            q,
            k,
            v,
            log_gate,
            initial_state=state,
            return_state=True,
            backend=backend,
        )
        assert last is not None
        return torch.autograd.grad(output.square().sum() + last.sum(), inputs[wanted])[0]

    assert_close("gradient", gradient(tensors(), backend), gradient(tensors(dtype=torch.float64), "reference"), 1e-4)


@pytest.mark.parametrize("backend", ["chunk", "native"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_in_float64(backend: str, packed: bool, reverse: bool) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        output, last = gated_linear_attention(
            q, k, v, log_gate, scale=0.7, initial_state=state, cu_seqlens=cuts, return_state=True, reverse=reverse,
            backend=backend, chunk_size=4, subchunk_size=2,
        )  # fmt: skip
        assert last is not None
        return output, last

    cuts = torch.tensor([0, 3, 3, 9]) if packed else None
    case = make_case(9, 2, 3, batch=1, heads=2, bounds=(0, 3, 3, 9) if packed else None).to(torch.float64)
    assert case.initial_state is not None
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v, case.log_gate - 0.01, case.initial_state)]
    inputs[3] = inputs[3].detach().requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", ["chunk", "native"])
def test_gradcheck_of_both_ways_in_float64(backend: str) -> None:
    case = make_case(7, 2, 3, batch=1).to(torch.float64)
    gates = [(case.log_gate - 0.01).requires_grad_(), (case.log_gate.flip(1) - 0.3).requires_grad_()]
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)] + gates
    assert torch.autograd.gradcheck(lambda *x: bidirectional_gated_linear_attention(*x, backend=backend), inputs)


@pytest.mark.parametrize("backend", ["chunk", "native"])
def test_a_second_derivative_is_refused(backend: str) -> None:
    q, k, v, log_gate, _ = tensors()
    q.requires_grad_()
    losses = (
        gated_linear_attention(q, k, v, log_gate, backend=backend).output.square().sum(),
        bidirectional_gated_linear_attention(q, k, v, log_gate, log_gate, backend=backend).square().sum(),
    )
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"second derivative|autograd formula"):
            torch.autograd.grad(gradient.square().sum(), q)


def operator_samples() -> list[tuple[Any, tuple[Any, ...]]]:
    samples: list[tuple[Any, tuple[Any, ...]]] = []
    ops = torch.ops.headgate
    for packed in (False, True):
        for with_state in (False, True):
            q, k, v, log_gate, start = tensors(packed=packed)
            state = start if with_state else None
            cuts = bounds(packed)
            tokens = [x.requires_grad_() for x in (q, k, v, log_gate)]
            final = gated_linear_attention(
                *tokens, initial_state=state, cu_seqlens=cuts, return_state=True, backend="reference"
            ).state
            assert final is not None
            rest = (state, cuts, 0.5, packed, "native")
            samples.append((ops.gated_linear_attention.default, (*tokens, *rest)))
            chunks = (state, cuts, 0.5, packed, 8, 4)
            samples.append((ops.gated_linear_attention_chunkwise.default, (*tokens, *chunks)))
            plain = [x.detach() for x in tokens]
            samples.append(
                (
                    ops.gated_linear_attention_chunkwise_backward.default,
                    (None if with_state else torch.ones_like(v), start, *plain, *chunks),
                )
            )
            samples.append(
                (
                    ops.gated_linear_attention_backward.default,
                    (torch.ones_like(v), start if with_state else None, *plain, state, final.detach(), *rest[1:]),
                )
            )
        both = (*tokens, tokens[-1].detach() - 1)
        samples.append((ops.bidirectional_gated_linear_attention.default, (*both, cuts, 0.5, "native")))
        samples.append(
            (
                ops.bidirectional_gated_linear_attention_backward.default,
                (torch.ones_like(v), *(x.detach() for x in both), cuts, 0.5, "native"),
            )
        )
    half = [x.bfloat16() for x in tensors()[:3]]
    samples.append(
        (ops.gated_linear_attention.default, (*half, tensors()[3], tensors()[4], None, 0.5, False, "native"))
    )
    return samples


@pytest.mark.parametrize("index", range(21))
def test_the_registered_operators_pass_opcheck(index: int) -> None:
    samples = operator_samples()
    assert len(samples) == 21
    operator, arguments = samples[index]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("backend", ["chunk", "native"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layer", [TwoLayers, BothWays])
def test_compiled_whole_it_gives_the_same_values_and_gradients(
    backend: str, packed: bool, layer: Callable[[str], nn.Module]
) -> None:
    torch._dynamo.reset()
    eager, compiled = layer(backend), torch.compile(layer(backend), fullgraph=True, backend="aot_eager")
    inputs = tensors(packed=packed)
    plain = outputs_and_gradients(eager, inputs, bounds(packed))
    check_same(outputs_and_gradients(compiled, inputs, bounds(packed)), plain, 1e-5)


@pytest.mark.parametrize("backend", ["chunk", "native"])
def test_compiled_it_follows_the_length(backend: str) -> None:
    torch._dynamo.reset()
    layer = TwoLayers(backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (21, 13, 20):
        inputs = (*(x[:, :length] for x in tensors()[:4]), tensors()[4])
        check_same(outputs_and_gradients(compiled, inputs), outputs_and_gradients(layer, inputs), 1e-5)


@pytest.mark.parametrize("backend", ["auto", "chunk"])
def test_inductor_gives_the_same_values_and_gradients(backend: str) -> None:
    torch._dynamo.reset()
    run = TwoLayers(backend)
    compiled = torch.compile(run, fullgraph=True)
    check_same(outputs_and_gradients(compiled, tensors()), outputs_and_gradients(run, tensors()), 1e-5)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("layer", [TwoLayers, BothWays])
def test_exported_it_gives_the_same_values(backend: str, layer: Callable[[str], nn.Module]) -> None:
    module, inputs = layer(backend), tensors()
    program = torch.export.export(module, inputs)
    other = tensors(seed=1)
    for a, b in zip(program.module()(*other), module(*other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    packed = (*tensors(packed=True), bounds(True))
    program = torch.export.export(module, packed)
    for a, b in zip(program.module()(*packed), module(*packed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["chunk", "native"])
@pytest.mark.parametrize("layer", [TwoLayers, BothWays])
def test_exported_batch_and_length_stay_free(layer: Callable[[str], nn.Module], backend: str) -> None:
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shapes = [{0: batch, 1: length}] * 4 + [{0: batch}]
    program = torch.export.export(layer(backend), tensors(), dynamic_shapes=tuple(shapes))
    case = make_case(50, 3, 4, batch=5)
    assert case.initial_state is not None
    inputs = (case.q, case.k, case.v, case.log_gate, case.initial_state)
    for a, b in zip(program.module()(*inputs), layer("reference")(*inputs), strict=True):
        assert_close("result", a, b, 2e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_changes_neither_precision_nor_dtype(backend: str) -> None:
    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return TwoLayers(backend)(*inputs)

    inside = outputs_and_gradients(run, tensors())
    assert [x.dtype for x in inside] == [torch.float32] * 7
    check_same(inside, outputs_and_gradients(TwoLayers(backend), tensors()), 1e-6)


@pytest.mark.parametrize("backend", ["chunk", "native"])
def test_a_backward_pass_under_autocast_stays_in_float32(backend: str) -> None:
    plain = outputs_and_gradients(TwoLayers(backend), tensors())
    with torch.autocast("cpu", torch.bfloat16):
        check_same(outputs_and_gradients(TwoLayers(backend), tensors()), plain, 1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference", *BACKENDS])
def test_under_autocast_bfloat16_tokens_with_float32_gates_are_scanned_in_float32(backend: str) -> None:
    torch.manual_seed(0)
    project = nn.Linear(6, 2 * (3 + 3 + 4))
    hidden, log_gate = torch.randn(2, 21, 6), tensors()[3]
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = project(hidden).view(2, 21, 2, 10).split([3, 3, 4], dim=-1)
        output, state = gated_linear_attention(q, k, v, log_gate, return_state=True, backend=backend)
    assert output.dtype == torch.bfloat16
    assert state is not None
    assert state.dtype == torch.float32
    exact = gated_linear_attention(
        q.double(), k.double(), v.double(), log_gate.double(), return_state=True, backend="reference"
    )
    assert exact.state is not None
    assert_close("state", state, exact.state, 2e-5)
    rounding = torch.finfo(torch.bfloat16).eps / 2
    allowed = rounding * exact.output.abs() + 2e-5 * exact.output.abs().max()
    assert ((output - exact.output).abs() <= allowed).all()


@pytest.mark.parametrize("backend", ["auto", "reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_the_meta_device_it_gives_shapes_and_dtypes(backend: str, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v, log_gate = (x.to("meta", dtype) for x in tensors()[:4])
    start = tensors()[4].to("meta", wide)
    output, state = gated_linear_attention(
        q,
        k,
        v,
        log_gate,
        initial_state=start,
        return_state=True,
        backend=backend,
    )
    assert state is not None
    assert (output.device.type, output.shape, output.dtype) == ("meta", v.shape, dtype)
    assert (state.device.type, state.shape, state.dtype) == ("meta", start.shape, wide)


@pytest.mark.parametrize("backend", ["chunk", "native"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_counted_as_decay_write_and_read_of_the_state(backend: str, device: str) -> None:
    q, k, v, log_gate = (x.to(device) for x in tensors()[:4])
    forward = 6 * 2 * 21 * 2 * 3 * 4  # 6 · batch · length · heads · key · value
    with FlopCounterMode(display=False) as counter:
        gated_linear_attention(q, k, v, log_gate, backend=backend)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        bidirectional_gated_linear_attention(q, k, v, log_gate, log_gate, backend=backend)
    assert counter.get_total_flops() == 2 * forward
    q.requires_grad_()
    output = gated_linear_attention(q, k, v, log_gate, backend=backend).output
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 3 * forward
