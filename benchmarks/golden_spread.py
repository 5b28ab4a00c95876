"""How far the golden trajectory moves between the instruction sets of one machine.

    python benchmarks/golden_spread.py OUT

Each variant is a process forked from one that has imported everything and computed nothing; the
first one's trajectory is written to OUT/first.json, and the others' differences are printed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

from test_golden import differences, trajectory

VARIANTS = ("avx512", "avx2", "default", "avx512-again")


def main(out: Path) -> None:
    children = {}
    for name in VARIANTS:
        if (pid := os.fork()) == 0:
            os.environ["ATEN_CPU_CAPABILITY"] = name.split("-")[0]
            torch.set_num_threads(1)
            found = trajectory(out / name)
            found["capability"] = torch.backends.cpu.get_cpu_capability()
            (out / f"{name}.json").write_text(json.dumps(found))
            os._exit(0)
        children[name] = pid
    for pid in children.values():
        os.waitpid(pid, 0)
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in VARIANTS}
    first = found["avx512"]
    golden = {name: column for name, column in first.items() if name != "capability"}
    (out / "first.json").write_text(json.dumps(golden, indent=1) + "\n")
    for name, other in found.items():
        apart = " ".join(f"{k} {v:.1e}" for k, v in differences(first, other).items())
        print(f"{name:18} {other['capability']:8} {apart}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
