"""How long a newcomer waits: imports and the quick commands, against ``import torch`` in the same run.

``python benchmarks/import_time.py`` starts fresh interpreters in turn and prints the medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

PROGRAMS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import headgate": [sys.executable, "-c", "import headgate"],
    "import headgate.nn (torch included)": [sys.executable, "-c", "import headgate.nn"],
    "headgate --help": [sys.executable, "-m", "headgate.cli", "--help"],
    "headgate list": [sys.executable, "-m", "headgate.cli", "list"],
}
ROUNDS = 7


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for round_number in range(ROUNDS + 1):
        for name, command in PROGRAMS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if round_number:  # the first round fills the caches
                times[name].append(time.perf_counter() - began)
    torch_time = statistics.median(times["import torch"])
    print(f"{'':<38}{'median':>9}{'against import torch':>24}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<38}{median:>7.2f} s{median / torch_time:>22.2f} x")


if __name__ == "__main__":
    main()
