"""lucmos/relreps: the relative block in its options, with gradients, subspaces, and the CKA that it comes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headgate.evaluate import cka
from headgate.methods.contrastive.relative_representations import (
    RelativeAttention,
    RelativeProjection,
    RelativeQuantizer,
    RelativeRepresentation,
    SubspaceRelativeAttention,
)
from tests.golden.harness import Golden, golden_case

BASIS_CHANGE = {"rtol": 1e-3, "atol": 1e-5}


@golden_case("relative_projection")
def check_relative_projection(golden: Golden) -> None:
    """Every stored option as the functional block, and where it can be had so, as projection and as estimator."""
    config, tensors = golden.config, golden.tensors
    count, dim, bin_size = config["anchors"], config["dim"], config["bin_size"]
    groups, classes = config["aggregation_groups"], config["classes"]
    anchors, labels = tensors["anchors"], tensors["anchor_targets"]
    rounding = RelativeQuantizer("round", bin_size)

    def block(**options: Any) -> RelativeAttention:
        return RelativeAttention(count, dim, **options).eval()

    plain: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "cosine": ({}, {}),
        "inner_scaled": ({"similarity": "inner"}, {"similarity": "inner"}),
        "basis_change_l2": (dict.fromkeys(["normalize"], True) | {"similarity": "basis_change"},) * 2,
        "similarity_round": ({"quantizer": rounding}, {"quantize": "round", "bin_size": bin_size}),
        "absolute_round": (
            {"absolute_quantizer": rounding, "official_quirks": True},
            {"quantize": "round", "bin_size": bin_size, "quantize_on": "absolute"},
        ),
        "smooth_steps": (
            {"quantizer": RelativeQuantizer("smooth", bin_size), "official_quirks": True},
            {"quantize": "smooth"},
        ),
        "cosine_layernorm": ({"out_norm": "layernorm"},) * 2,
        "cosine_l2": ({"out_norm": "l2"},) * 2,
    }
    for name, (of_block, of_projection) in plain.items():
        tolerance = BASIS_CHANGE if name == "basis_change_l2" else {}
        golden.assert_close(name, block(**of_block)(tensors["x"], anchors), name, **tolerance)
        projection = RelativeProjection(anchors, **of_projection).eval()
        golden.assert_close(f"{name}, projection", projection(tensors["x"]), name, **tolerance)
        estimator = RelativeRepresentation(**of_projection).fit(anchors.numpy())
        golden.assert_close(f"{name}, estimator", estimator.transform(tensors["x"].numpy()), name, **tolerance)

    for name, options in (
        ("cosine", {}),
        ("similarity_round", {"quantizer": rounding}),
        ("absolute_round", {"absolute_quantizer": rounding, "official_quirks": True}),
    ):
        x = tensors["x"].requires_grad_()
        block(**options).train()(x, anchors).backward(tensors["cotangent"])
        golden.assert_close(f"gradient of {name}", x.grad, f"grad_x_{name}")

    for name in [name for name in tensors if name.startswith("absolute_cluster_threshold_")]:
        threshold = float(name.rpartition("_")[2])
        clusters = block(absolute_quantizer=RelativeQuantizer("cluster", cluster_threshold=threshold))
        golden.assert_close("clusters of items and anchors", clusters(tensors["x"], anchors), name)

    averages = block(aggregate="class", num_classes=classes, groups=groups)
    golden.assert_close("averages by class", averages(tensors["x"], anchors, labels), "stratified_avg")
    for pool in ("concat", "mean"):
        subspaces = SubspaceRelativeAttention(count, dim, subspaces=2, pool=pool)
        golden.assert_close(f"two subspaces, {pool}", subspaces(tensors["x"], anchors), f"two_subspaces_{pool}")

    x, other = tensors["x"], tensors["cka_other"]
    _expect(golden, "linear CKA", cka(x, other, debiased=False), golden.json["cka"]["linear"])
    rbf = cka(x, other, "rbf", debiased=False)
    _expect(golden, "RBF CKA", rbf, golden.json["cka"]["rbf_median_sigma"])


def _expect(golden: Golden, name: str, ours: float, expected: float) -> None:
    close = torch.isclose(Tensor([ours]), Tensor([expected]), rtol=golden.rtol, atol=golden.atol)
    if not bool(close):
        raise AssertionError(f"{name}: ours is {ours!r}, golden is {expected!r}")
    golden.assert_equal(name, True, True)
