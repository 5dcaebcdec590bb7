"""The Triton kernels, without a GPU: their values in Triton's interpreter, and that they compile for one.

Triton decides at its first import whether ``@triton.jit`` compiles or interprets. So the bodies of these tests run in
processes of their own, one of each kind, whatever this process has imported; nothing here changes its environment. This
file is the program of those processes, too: it takes the names and arguments of tests and answers with tracebacks.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from headgate.ops import bidirectional_gated_linear_attention, gated_linear_attention
from tests.ops.gated_linear_attention.cases import (
    GATES,
    assert_close,
    assert_same,
    expected,
    make_case,
    results,
)
from tests.ops.gated_linear_attention.test_bidirectional import both_ways, make_inputs

if importlib.util.find_spec("triton") is None:
    pytest.skip("the kernels need the package triton", allow_module_level=True)

FORWARD = 2e-6
GRADIENT = 5e-6
"""Largest deviations in float32: no gate, however strong, may cost the others' digits."""

PACKED = (0, 0, 17, 17, 82, 90, 90)

BODIES: dict[str, Callable[..., None]] = {}


class Process:
    """Runs tests one after the other in a Python of its own, interpreting the kernels or compiling them."""

    def __init__(self, kind: str) -> None:
        self.cache = tempfile.TemporaryDirectory()
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        environment["TRITON_CACHE_DIR"] = self.cache.name
        if kind == "interpreted":
            environment["TRITON_INTERPRET"] = "1"
        self.popen = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(self, name: str, arguments: dict[str, Any]) -> None:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(json.dumps([name, arguments]) + "\n")
        self.popen.stdin.flush()
        answer = self.popen.stdout.readline()
        assert answer, f"the process ended within {name}, with code {self.popen.wait()}"
        failure = json.loads(answer)
        assert not failure, failure

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()
        self.cache.cleanup()


PROCESSES: dict[str, Process] = {}


@pytest.fixture(scope="module", autouse=True)
def end_processes() -> Iterator[None]:
    yield
    while PROCESSES:
        PROCESSES.popitem()[1].close()


def in_process(kind: str, body: Callable[..., None]) -> Callable[..., None]:
    BODIES[body.__name__] = body

    @functools.wraps(body)
    def test(**arguments: Any) -> None:
        if kind not in PROCESSES:
            PROCESSES[kind] = Process(kind)
        PROCESSES[kind].run(body.__name__, arguments)

    return test


interpreted = functools.partial(in_process, "interpreted")
compiled = functools.partial(in_process, "compiled")


def serve() -> None:
    """Run what is asked for until the other end closes; what the tests print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            BODIES[name](**arguments)
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        answers.write(json.dumps(failure) + "\n")
        answers.flush()


def backend() -> ModuleType:
    from headgate.ops.gated_linear_attention import triton_backend

    return triton_backend


def check_backend(**arguments: Any) -> None:
    assert_same(results(make_case(**arguments), "triton"), expected(**arguments), FORWARD, GRADIENT)


@interpreted
def test_fresh_memory_is_nan_in_these_tests() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2)).isnan().all()


@pytest.mark.parametrize(
    ("length", "reverse"),
    [(length, False) for length in (1, 2, 15, 16, 17, 63, 64, 65, 130)]
    + [(length, True) for length in (2, 17, 64, 130)],
)
@interpreted
def test_values_state_and_gradients_are_those_of_the_reference(length: int, reverse: bool) -> None:
    check_backend(length=length, batch=1, heads=2 if length < 60 else 1, gates="strong", reverse=reverse)


@pytest.mark.parametrize("gates", GATES)
@interpreted
def test_gates_of_every_kind_leave_results_accurate(gates: str) -> None:
    check_backend(length=40, key=3, value=4, batch=1, heads=1, gates=gates)
    check_backend(length=18, key=3, value=4, batch=1, heads=1, gates=gates, reverse=True)


@interpreted
def test_gates_that_let_nothing_pass_get_no_gradient_at_all() -> None:
    for gates in ("some_-inf", "some_-1e4"):
        case = make_case(18, batch=1, gates=gates)
        closed = case.log_gate <= -1e4
        assert closed.any()
        assert (results(case, "triton")["gradient of log_gate"][closed] == 0).all()


@pytest.mark.parametrize(("key", "value", "length"), [(1, 1, 18), (33, 20, 18), (20, 40, 66), (130, 70, 18)])
@interpreted
def test_key_and_value_may_have_any_size(key: int, value: int, length: int) -> None:
    check_backend(length=length, key=key, value=value, batch=1, heads=1)


@interpreted
def test_half_inputs_may_walk_with_larger_blocks_of_the_state() -> None:
    case = make_case(17, 66, 5, batch=1, heads=1).to(torch.float16)
    with mock.patch.object(backend(), "_ENOUGH_PROGRAMS", 1):
        found = results(case, "triton")
    assert_same(found, results(case.to(torch.float64), "reference"), 2e-3, 2e-3)


@pytest.mark.parametrize("reverse", [False, True])
@interpreted
def test_float64_in_the_interpreter_is_exact_to_rounding(reverse: bool) -> None:
    arguments: dict[str, Any] = {"length": 67, "batch": 1, "heads": 1, "gates": "bursts", "reverse": reverse}
    assert_same(results(make_case(**arguments).to(torch.float64), "triton"), expected(**arguments), 1e-13, 1e-13)


@pytest.mark.parametrize("reverse", [False, True])
@interpreted
def test_packed_sequences_do_not_see_each_other_and_may_be_empty(reverse: bool) -> None:
    check_backend(length=90, batch=1, heads=1, bounds=PACKED, gates="strong", reverse=reverse)


@interpreted
def test_packed_sequences_start_from_zeros_without_an_initial_state() -> None:
    check_backend(length=9, batch=1, bounds=(0, 0, 2, 9), initial_state=False)


@interpreted
def test_rows_of_a_batch_are_separate_and_start_from_zeros() -> None:
    check_backend(length=18, batch=3, heads=1, initial_state=False)


@interpreted
def test_the_batch_may_be_empty() -> None:
    check_backend(length=18, batch=0)
    assert {x.shape[0] for x in both_ways(make_inputs(18, batch=0), "triton").values()} == {0}


@interpreted
def test_a_loss_may_use_the_output_alone_or_the_state_alone() -> None:
    check_backend(length=18, batch=1, heads=1, state_weight=False)
    found = []
    for case, name in (
        (make_case(18, batch=1, heads=1), "triton"),
        (make_case(18, batch=1, heads=1).to(torch.float64), "reference"),
    ):
        assert case.state_weight is not None
        k, v, gate = (x.detach().requires_grad_() for x in (case.k, case.v, case.log_gate))
        state = gated_linear_attention(case.q, k, v, gate, return_state=True, backend=name).state
        assert state is not None
        found.append(torch.autograd.grad((state * case.state_weight).sum(), (k, v, gate)))
    for name, ours, exact in zip(("k", "v", "log_gate"), *found, strict=True):
        assert_close(name, ours, exact, GRADIENT)


@interpreted
def test_a_sequence_in_two_parts_with_the_state_handed_on_is_the_whole_sequence() -> None:
    case = make_case(70, batch=1, heads=1)
    inputs = (case.q, case.k, case.v, case.log_gate)
    whole = gated_linear_attention(*inputs, return_state=True, backend="triton")
    first = gated_linear_attention(*(x[:, :23] for x in inputs), return_state=True, backend="triton")
    second = gated_linear_attention(
        *(x[:, 23:] for x in inputs), initial_state=first.state, return_state=True, backend="triton"
    )
    assert_close("output", torch.cat([first.output, second.output], dim=1), whole.output, FORWARD)
    assert whole.state is not None
    assert second.state is not None
    assert_close("state", second.state, whole.state, FORWARD)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("gates", ["mild", "some_-inf"])
@interpreted
def test_half_inputs_keep_half_precision_and_states_float32(dtype: str, gates: str) -> None:
    case = make_case(40, 20, 24, batch=1, heads=1, gates=gates).to(getattr(torch, dtype))
    found, exact = results(case, "triton"), results(case.to(torch.float64), "reference")
    for name, value in found.items():
        # The interpreter cuts bfloat16 off where a GPU rounds it.
        allowed = {"bfloat16": 0.01, "float16": 0.001}[dtype]
        if name in ("state", "gradient of initial_state"):
            assert value.dtype == torch.float32
            allowed = FORWARD
        else:
            assert value.dtype == case.q.dtype
        error = (value.double() - exact[name]).square().mean().sqrt() / exact[name].square().mean().sqrt()
        assert error <= allowed, f"{name} is off by {error:.1e} in the mean, allowed are {allowed}"


@interpreted
def test_gates_may_be_wider_than_half_inputs() -> None:
    case = make_case(20, batch=1)
    case = replace(case.to(torch.float16), log_gate=case.log_gate)
    found, exact = results(case, "triton"), results(case.to(torch.float64), "reference")
    assert found["gradient of log_gate"].dtype == torch.float32
    assert_same(found, exact, 1e-3, 1e-3)


@interpreted
def test_float16_states_and_scores_beyond_its_range_do_not_overflow() -> None:
    case = make_case(66, batch=1, heads=1, gates="open")
    case = replace(case, q=case.q.abs() * 1e-3, k=case.k.abs() * 100, v=case.v.abs() * 100).to(torch.float16)
    exact = results(case.to(torch.float64), "reference")
    assert exact["state"].max() > torch.finfo(torch.float16).max
    assert_close("output", results(case, "triton")["output"], exact["output"], 1e-3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "head_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "length_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "odd_place": lambda x: torch.cat([x[..., :1], x], dim=-1)[..., 1:],
    "shared_by_heads": lambda x: x[:, :, :1].expand_as(x),
    "one_number": lambda x: x.flatten()[0].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@interpreted
def test_inputs_and_the_gradient_may_be_strided_in_any_way(layout: str) -> None:
    change = LAYOUTS[layout]
    case = make_case(18, bounds=(0, 7, 18), batch=1)
    names = ("q", "k", "v", "log_gate", "output_weight")
    case = replace(case, **{name: change(getattr(case, name)) for name in names})
    assert_same(results(case, "triton"), results(case.to(torch.float64), "reference"), FORWARD, GRADIENT)


@interpreted
def test_states_may_be_strided_in_any_way() -> None:
    case = make_case(18)
    assert case.initial_state is not None
    assert case.state_weight is not None
    strided = replace(
        case, initial_state=case.initial_state.mT.contiguous().mT, state_weight=case.state_weight.mT.contiguous().mT
    )
    assert_same(results(strided, "triton"), results(case.to(torch.float64), "reference"), FORWARD, GRADIENT)


@interpreted
def test_inputs_are_left_as_they_were() -> None:
    case = make_case(18)
    results(case, "triton")
    again = make_case(18)
    for name in ("q", "k", "v", "log_gate", "initial_state"):
        assert torch.equal(getattr(case, name), getattr(again, name))


def check_both_ways(inputs: list[Tensor], **options: Any) -> None:
    exact = both_ways([x.double() for x in inputs], "two scans", **options)
    assert_same(both_ways(inputs, "triton", **options), exact, FORWARD, GRADIENT)


@pytest.mark.parametrize("length", [1, 17, 66])
@interpreted
def test_both_ways_are_the_mean_of_two_scans(length: int) -> None:
    check_both_ways(make_inputs(length, "strong", batch=1))


@pytest.mark.parametrize("gates", ["closed", "bursts", "some_-inf"])
@interpreted
def test_both_ways_take_gates_of_every_kind(gates: str) -> None:
    check_both_ways(make_inputs(20, gates, key=3, value=4, batch=1))


@interpreted
def test_both_ways_on_packed_sequences() -> None:
    check_both_ways(make_inputs(40, "strong", batch=1), cu_seqlens=torch.tensor((0, 0, 17, 17, 36, 40, 40)), scale=-0.7)


@interpreted
def test_both_ways_take_gates_of_two_layouts_and_dtypes() -> None:
    q, k, v, forward, backward = make_inputs(17, batch=1)
    check_both_ways([q, k, v, forward, backward.transpose(1, 2).contiguous().transpose(1, 2)])
    forward = forward.bfloat16()
    exact = both_ways([x.double() for x in (q, k, v, forward, backward)], "two scans")
    found = both_ways([q, k, v, forward, backward], "triton")
    assert found["gradient of log_gate_forward"].dtype == torch.bfloat16
    assert_close("rounded", found.pop("gradient of log_gate_forward"), exact.pop("gradient of log_gate_forward"), 0.01)
    assert_same(found, exact, FORWARD, GRADIENT)


@interpreted
def test_the_operator_answers_its_checks_of_shapes_dtypes_and_gradients() -> None:
    case = make_case(3, batch=1)
    arguments = (case.q, case.k, case.v, case.log_gate, case.initial_state, None, 0.5, True, "triton")
    results = torch.library.opcheck(torch.ops.headgate.gated_linear_attention, arguments)
    assert set(results.values()) == {"SUCCESS"}
    arguments = (*make_inputs(3, batch=1), torch.tensor([0, 1, 3]), 0.5, "triton")
    results = torch.library.opcheck(torch.ops.headgate.bidirectional_gated_linear_attention, arguments)
    assert set(results.values()) == {"SUCCESS"}


KERNELS = {
    "inner_gradients_kernel",
    "key_query_gradients_kernel",
    "outputs_kernel",
    "score_gradients_kernel",
    "scores_kernel",
    "state_gradients_kernel",
    "states_kernel",
    "value_gradients_kernel",
}
SHARED_MEMORY = 99 * 1024
"""Bytes per block that every GPU since Ampere has."""


def compile_for_gpu(
    kernel: Any, grid: tuple[int, ...], warmup: bool, num_warps: int, num_stages: int, **arguments: Any
) -> Any:
    """What ``triton.JITFunction.run`` does up to the launch, for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    signature, constants, alignment = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[name] = pointers[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
            continue
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            alignment[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, alignment)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def check_compiles(launch: Callable[[], object]) -> None:
    """Compile every kernel that ``launch`` launches, in place of running it."""
    import triton

    seen = {}

    def run(kernel: Any, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        seen[kernel.__name__] = compile_for_gpu(kernel, grid, warmup, **arguments)

    with mock.patch.object(triton.JITFunction, "run", run):
        launch()
    assert seen.keys() == KERNELS
    for name, binary in seen.items():
        assert binary.asm["cubin"], name
        assert binary.metadata.shared <= SHARED_MEMORY, f"{name} takes {binary.metadata.shared} bytes of shared memory"


@compiled
def test_every_kernel_compiles_for_a_gpu_with_float32_inputs_and_states() -> None:
    q, k, g, v, do = (torch.empty(2, 130, 3, n, device="meta") for n in (16, 16, 16, 20, 20))
    state = torch.empty(2, 3, 16, 20, device="meta")

    def launch() -> None:
        backend().forward(q, k, v, g, state, None, 0.5, True)
        backend().backward(do, state, q, k, v, g, state, state, None, 0.5, True)

    check_compiles(launch)


@compiled
def test_every_kernel_compiles_for_a_gpu_with_bfloat16_inputs_both_ways_and_packed() -> None:
    shapes = [(1, 4096, 16, n) for n in (128, 128, 256, 256)]
    q, k, v, do = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    gate = torch.empty(q.shape, device="meta")
    bounds = torch.empty(9, dtype=torch.int64, device="meta")

    def launch() -> None:
        backend().bidirectional(q, k, v, gate, gate, bounds, 0.5)
        backend().bidirectional_backward(do, q, k, v, gate, gate, bounds, 0.5)

    check_compiles(launch)


@compiled
def test_without_a_gpu_or_the_interpreter_the_backend_says_what_it_needs() -> None:
    case = make_case(4)
    with pytest.raises(RuntimeError, match=r"needs a GPU.*TRITON_INTERPRET=1"):
        backend().forward(case.q, case.k, case.v, case.log_gate, None, None, 0.5, False)
    with pytest.raises(TypeError, match=r"float32 on a GPU.*backend='chunk'"):
        wide = [x.double().to("meta") for x in (case.q, case.k, case.v, case.log_gate)]
        backend().forward(*wide, None, None, 0.5, False)
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: needs a GPU, not cpu"):
        gated_linear_attention(case.q, case.k, case.v, case.log_gate, backend="triton")
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: needs a GPU, not cpu"):
        bidirectional_gated_linear_attention(*make_inputs(4), backend="triton")


if __name__ == "__main__":
    serve()
