"""Names: found, not found, and of the user's own."""

import subprocess
import sys

import pytest

from dgpo import registry
from dgpo.errors import UserError


def test_a_registered_name_gives_its_object():
    from dgpo.rewards.shipped.stand_in import redness

    assert registry.resolve("reward", "redness") is redness


def test_a_path_is_accepted_everywhere():
    import math

    assert registry.resolve("reward", "math:sqrt") is math.sqrt
    assert registry.resolve("prompts", "collections:OrderedDict.fromkeys")(["a"]) == {"a": None}


def test_a_file_is_accepted_and_loaded_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("calls = []\ndef score(images, prompts):\n    return [1.0] * len(images)\n")
    first = registry.resolve("reward", f"{file}:score")
    assert first([None], ["a"]) == [1.0]
    assert registry.resolve("reward", f"{file}:score") is first


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pocket_genevl", ["pocket_genevl", "did you mean 'pocket_geneval'", "redness", ".py"]),
        ("dgpo.rewards.shipped.stand_in:rednes", ["rednes", "did you mean 'redness'"]),
        ("no_such_module:score", ["no_such_module"]),
        ("/no/such/file.py:score", ["/no/such/file.py"]),
    ],
)
def test_an_unknown_name_says_what_would_work(name, words):
    with pytest.raises(UserError) as error:
        registry.resolve("reward", name)
    for word in words:
        assert word in str(error.value)


def test_the_registry_imports_nothing_heavy():
    code = (
        "import sys, dgpo.registry, dgpo.cli; assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_fails_is_not_kept_half_loaded(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('in the file')\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"RuntimeError: in the file \(broken.py, line 1\)"):
            registry.resolve("reward", f"{file}:score")
