"""Prints the lower bound of each of dgpo's requirements as a constraint for pip.

    python -m tools.lowest > lowest.txt    # make test-lowest installs by it

``torch==2.13.0`` among the arguments takes the place of torch's own bound, where no build of the
oldest one can be had.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it along
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

EXTRAS = ("rewards", "datasets", "serve", "media", "audio")


def lowest(project: dict[str, Any], instead: list[str]) -> list[str]:
    """The constraints ``name==version`` of the requirements that have a lower bound.

    Args:
        project: The table ``project`` of a pyproject.toml.
        instead: Constraints that replace those of the same names.
    """
    texts = list(project["dependencies"])
    for extra in EXTRAS:
        texts += project["optional-dependencies"][extra]
    found = {}
    for need in map(Requirement, texts):
        for bound in need.specifier:
            if bound.operator == ">=":
                found[need.name] = f"{need.name}=={bound.version}"
    return sorted((found | {Requirement(text).name: text for text in instead}).values())


if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    print("\n".join(lowest(tomllib.loads(pyproject.read_text())["project"], sys.argv[1:])))
