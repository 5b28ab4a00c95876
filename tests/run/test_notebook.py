"""Progress in a notebook: one bar that moves, and few lines, in a real kernel."""

import os
import sys

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed (the extra dev)")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (the extra dev)")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (the extra dev)")

PROGRESS = """
from dgpo.run.progress import Progress

with Progress(300) as progress:
    for done in range(1, 301):
        progress.stage("rollout")
        progress.stage("training")
        progress.iteration(
            done, reward=0.5, spread=1.0, clipped=0.0, samples_per_second=9.0, trained_seconds=done
        )
        if done % 100 == 0:
            progress.stage("evaluating")
            progress.say(f"iteration {done}: held-out redness 0.5 [0.4, 0.6]")
"""
TRAIN = """
import torch
from families.tiny import sd3_small
from tiny_runs import PROMPTS, settings
from dgpo import Trainer

torch.set_num_threads(1)
recipe = settings(train={"iterations": 4}, eval={"every": 2}, run={"dir": "run"})
trainer = Trainer(sd3_small(), "redness", PROMPTS, PROMPTS[:2], recipe=recipe)
report = trainer.train()
"""


def outputs(code, folder, seconds=60):
    """What the cell of a notebook shows when it has been run."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    run = nbclient.NotebookClient(
        notebook, timeout=seconds, resources={"metadata": {"path": str(folder)}}
    )
    run.execute()
    nbformat.validate(notebook)
    return notebook.cells[0].outputs


def shown(found):
    """The bar's text and HTML, and the lines beside it, by stream."""
    (bar,) = [one.data for one in found if one.output_type == "display_data"]
    streams = {"stdout": "", "stderr": ""}
    for one in found:
        if one.output_type == "stream":
            streams[one.name] += one.text
    lines = {name: text.splitlines() for name, text in streams.items()}
    return bar["text/plain"], bar["text/html"], lines


def test_a_bar_that_is_rewritten_and_the_lines_that_stay(tmp_path):
    text, html, lines = shown(outputs(PROGRESS, tmp_path))
    assert text == (
        "iteration 300/300  reward 0.500  spread 100%  clipped 0%  9.0 samples/s  0:00 left"
    )
    assert html == f'<progress value="300" max="300"></progress> <code>{text}</code>'
    said = [f"iteration {done}: held-out redness 0.5 [0.4, 0.6]" for done in (100, 200, 300)]
    assert lines == {"stdout": said, "stderr": []}


@pytest.mark.slow
def test_a_run_in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    text, _, lines = shown(outputs(TRAIN, tmp_path, seconds=300))
    assert text.startswith("iteration 4/4  reward 0.")
    said = [line.partition(":")[0] for line in lines["stdout"]]
    assert said[:2] == ["iteration 2", "iteration 4"] and len(said) < 6
    assert lines["stdout"][-1].endswith("results in run")
    assert len(lines["stderr"]) < 6, "other libraries may warn, the run is silent there"
