"""The runs that test_distributed.py makes with two processes, all under one launch.

``torchrun --nproc_per_node 2 -m tests.train.together <folder>`` writes ``<folder>/<process>.json``: run → what it gave.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from headgate.train import DivergedError, History, base_model, fit
from tests.train.runs import accuracy, small_batches, small_model, small_run

PLAIN: dict[str, Any] = {"dropout": 0.0, "norm": False}


def sharding() -> Accelerator:
    """An accelerator that shards over processes on the CPU, which accelerate's launcher offers for GPUs alone."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    return accelerator


def described(model: nn.Module, history: History) -> dict[str, Any]:
    return {
        "losses": history.losses,
        "metrics": list(history.metrics.items()),
        "model": type(model).__name__,
        "forward": "forward" in model.__dict__,
        "parameter": type(next(model.parameters())).__name__,
        "weights": {name: value.tolist() for name, value in model.state_dict().items() if type(value) is Tensor},
    }


def main() -> None:
    folder = Path(sys.argv[1])
    process = os.environ["RANK"]
    gave: dict[str, Any] = {}

    for batches in ("function", "list"):
        files = {"checkpoints": folder / batches, "log": folder / f"{batches}.jsonl", "log_every": 1}
        gave[batches] = described(
            *small_run(batches, accumulate=2, checkpoint_every=12, evaluate=accuracy, **files, **PLAIN)
        )

    random: dict[str, Any] = {"batches": "loader-distributed", "steps": 12}
    gave["whole"] = described(*small_run(**random))
    small_run(**{**random, "steps": 7}, checkpoints=folder / "parts", keep=5)
    gave["parts"] = described(*small_run(**random, checkpoints=folder / "parts", checkpoint_every=12))

    gave["gathered"] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        gave["gathered"].append(model.require_backward_grad_sync)
        return model(batch[0]).square().mean()

    fit(nn.Linear(6, 1), small_batches("list"), watched, steps=2, accumulate=3)

    nan = small_batches("list")
    nan[3] = (nan[3][0] * float("nan"), nan[3][1])
    try:
        small_run(model=nn.Linear(6, 3), given=nan, steps=9)
    except DivergedError as error:
        gave["diverged"] = str(error)

    os.environ["HEADGATE_CACHE"] = str(folder / "cache")
    trained: list[int] = []

    def train(model: nn.Module) -> None:
        trained.append(len(small_run(model=model, batches="function", steps=6)[1].losses))

    base, _ = base_model("base", small_model, train, {})
    gave["base"] = {"trained": trained, "weight": base.state_dict()["0.weight"].tolist()}

    gave["bf16"] = described(*small_run(mixed_precision="bf16", **PLAIN))
    gave["after"] = described(*small_run("function", accumulate=2, **PLAIN))

    AcceleratorState._reset_state(reset_partial_state=True)
    gave["sharded whole"] = described(*small_run(accelerator=sharding(), steps=12, **PLAIN))
    small_run(accelerator=sharding(), steps=5, checkpoints=folder / "sharded", **PLAIN)
    gave["sharded parts"] = described(
        *small_run(accelerator=sharding(), steps=12, checkpoints=folder / "sharded", **PLAIN)
    )
    (folder / f"{process}.json").write_text(json.dumps(gave))


if __name__ == "__main__":
    main()
