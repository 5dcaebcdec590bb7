"""PGN and TPGN against Water2sea/TPGN: the cell with the linear layer behind it, and the whole model with its loss."""

from __future__ import annotations

import torch.nn.functional as F

from headgate.methods.sequence.pgn import PGN
from headgate.methods.sequence.pgn.official import build_long_range, build_tpgn, convert_state_dict, rename
from tests.golden.harness import Golden, golden_case


@golden_case("cell")
def check_cell(golden: Golden) -> None:
    """History, output, what the linear layer makes of it, and the gradients of everything that is stored."""
    branch = build_long_range(golden.config)
    branch.load_state_dict(convert_state_dict(golden.state("state.")))
    cell, (batch, _, phases) = branch.cell, golden.tensors["in.x"].shape[:3]
    assert isinstance(cell, PGN)
    x = golden.tensors["in.x"].requires_grad_()
    # Theirs: (batch, period, phase, channel, feature); the marks of all channels are the same ones.
    table, marks = x[..., 0], golden.tensors["in.x_mark"][:, :, :, 0]
    columns, column_marks = (t.transpose(1, 2).flatten(0, 1) for t in (table, marks))
    names = {"out.H": cell.extract_history(columns, column_marks), "out.Out": cell(columns, column_marks)}
    laid_out = {
        name: tensor.unflatten(0, (batch, phases)).transpose(1, 2).unflatten(3, (cell.groups, -1))
        for name, tensor in names.items()
    }
    for name, tensor in laid_out.items():
        golden.assert_close(name, tensor, name)
    combined = branch(table, marks).transpose(1, 2).unflatten(2, (cell.groups, -1))
    golden.assert_close("out.linear_long", combined, "out.linear_long")
    (laid_out["out.Out"] * golden.tensors["in.do"]).sum().backward()
    golden.assert_close("gradient of x", x.grad, "grad.x")
    _compare_gradients(golden, branch)


@golden_case("model")
def check_model(golden: Golden) -> None:
    """Forecast, loss, and the gradients of the input and of every weight."""
    # Theirs rounds the horizon up to whole periods and hands all of it on.
    model = build_tpgn({**golden.config, "pred_len": golden.tensors["out.y"].shape[1]})
    model.load_state_dict(convert_state_dict(golden.state("state.")))
    golden.assert_equal("parameters", sum(p.numel() for p in model.parameters()), golden.json["n_params"])
    x = golden.tensors["in.x"].requires_grad_()
    y = model(x, golden.tensors["in.x_mark"])
    golden.assert_close("forecast", y, "out.y")
    loss = F.mse_loss(y, golden.tensors["in.target"])
    golden.assert_close("loss", loss, "out.mse")
    loss.backward()
    if "grad.x" in golden.tensors:
        golden.assert_close("gradient of x", x.grad, "grad.x")
    _compare_gradients(golden, model)


def _compare_gradients(golden: Golden, module: object) -> None:
    ours = dict(module.named_parameters())  # type: ignore[attr-defined]
    for name in golden.json["official_parameters"]:
        if f"grad.{name}" in golden.tensors:
            golden.assert_close(f"gradient of {name}", ours[rename(name)].grad, f"grad.{name}")
