"""The wheel builds, installs into an empty environment, and holds all that the package needs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "dgpo"
# What a source folder may hold that is no part of the package.
LEFTOVERS = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", ".*")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the build leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "src", copy / "src", ignore=LEFTOVERS)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy, cwd=copy)
    (built,) = out.glob("dgpo-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel alone; the requirements come from this one through a .pth.

    A .pth line adds a folder to the path without reading the .pth files inside it, so the
    editable install of this repository stays invisible there.
    """
    venv = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", wheel),
        cwd=venv.parent,
    )
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv)
    (Path(site.strip()) / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


def outside(venv: Path) -> dict[str, str]:
    """The environment variables of a user's shell: nothing points into this repository."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HOME": str(venv.parent)}


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    wanted = {
        path.relative_to(ROOT / "src").as_posix(): path.read_bytes()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
        assert sorted(names) == sorted(wanted)
        for name in names:
            assert archive.read(name) == wanted[name], name


def test_wheel_carries_licence_requirements_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode()
        folder = info.rpartition("/")[0]
        licence = archive.read(f"{folder}/licenses/LICENSE").decode()
        commands = archive.read(f"{folder}/entry_points.txt").decode()
    assert licence == (ROOT / "LICENSE").read_text()
    assert "dgpo = dgpo.cli:main" in commands
    assert "License-Expression: Apache-2.0" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert any(line.startswith("Requires-Dist: diffusers<1,>=0.42.1") for line in required)
    # torchvision does not install beside every CPU build of torch: nothing may ask for it
    assert not any("torchvision" in line for line in required)


def test_constraints_pin_every_requirement_exactly() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    names = {name.lower().replace("_", "-") for name in pins}
    assert {"torch", "diffusers", "transformers", "peft", "rapidocr-onnxruntime"} <= names
    assert not any(name == "torchvision" or name.startswith("nvidia") for name in names)
    assert all("+" not in version for version in pins.values())


def test_package_imports_from_the_wheel(environment: Path) -> None:
    code = "import dgpo, dgpo.errors; print(dgpo.__file__)"
    shown = run(
        environment / "bin" / "python", "-c", code, cwd=environment.parent, env=outside(environment)
    )
    assert Path(shown.strip()).is_relative_to(environment)


def test_command_runs_from_the_wheel(environment: Path) -> None:
    shown = run(
        environment / "bin" / "dgpo", "--help", cwd=environment.parent, env=outside(environment)
    )
    for word in ("train", "eval", "sample"):
        assert word in shown
