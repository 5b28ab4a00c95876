"""`make audit` tells vulnerabilities that were found from a look that was not possible."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUND = 'printf "torch 1.0 CVE-1\\n" > "${@: -1}"; exit 1'


@pytest.mark.parametrize(
    ("pip_audit", "code", "said"),
    [
        ("exit 0", 0, "done in"),
        (FOUND, 2, "torch 1.0 CVE-1\nthe pinned versions above have known vulnerabilities"),
        ("exit 1", 2, "has looked at nothing"),
    ],
    ids=["nothing is known", "found", "out of reach"],
)
def test_three_ends(pip_audit: str, code: int, said: str, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {"bandit": "exit 0", "pip-audit": pip_audit}.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    (tmp_path / ".dgpo-installed").touch()
    command = ["make", "audit", f"VENV={tmp_path}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout, done
