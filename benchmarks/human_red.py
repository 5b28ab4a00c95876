"""A person who prefers red: a scripted one in a real browser teaches the small model to draw red.

    python benchmarks/human_red.py [--out runs/human-red] [--minutes 4] [key=value ...]

The recipe ``pocket-human`` on the captions that name no colour. The rater looks at the pictures on
the page in Chromium, reads their pixels there, clicks those in which most of what is drawn is red,
and presses Enter. Shown are, before and after, the share of objects on held-out captions that the
exact verifier reads as red, and the soft score of the captions, which nobody has asked for.
"""

from __future__ import annotations

import argparse
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dgpo.pocket.prompts import test_prompts, train_prompts
from dgpo.pocket.verifier import find_objects
from dgpo.recipe import Recipe
from dgpo.trainer import Trainer

NO_COLOUR = ("single_object", "two_object", "counting", "position")
RED_TILES = """tiles => tiles.map(tile => {
  const img = tile.querySelector("img");
  const canvas = document.createElement("canvas");
  canvas.width = img.naturalWidth; canvas.height = img.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(img, 0, 0);
  const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
  let drawn = 0, red = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (Math.max(...[0, 1, 2].map(c => Math.abs(data[i + c] - 225))) <= 45) continue;
    drawn += 1;
    red += data[i] > 150 && data[i + 1] < 100 && data[i + 2] < 100;
  }
  return drawn > 0 && red > drawn / 2;
})"""


def red_objects(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The share of a picture's objects that the verifier reads as red; 0 where it finds none."""
    shares = []
    for image in images:
        found = find_objects(np.asarray(image.convert("RGB")))
        shares.append(float(np.mean([one.color == "red" for one in found])) if found else 0.0)
    return shares


class Rater(threading.Thread):
    """Ranks in the browser until the program ends."""

    def __init__(self, url: str, chromium: str, shots: Path) -> None:
        super().__init__(daemon=True)
        self._url, self._chromium, self._shots = url, chromium, shots
        self.ranked, self.liked = 0, 0

    def run(self) -> None:
        from playwright.sync_api import Error, sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=self._chromium, args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1200, "height": 760})
            page.set_default_timeout(600_000)
            while True:
                try:
                    page.goto(self._url)
                    break
                except Error:  # the page is there with the first pictures
                    time.sleep(0.5)
            page.fill("#name", "scripted")
            page.click("text=Start")
            while True:
                self._rank(page)

    def _rank(self, page: Any) -> None:
        page.wait_for_function(
            """() => !document.querySelector("#work").hidden
            && !document.querySelector("#skip").disabled
            && [...document.querySelectorAll(".tile img")].every(img => img.naturalWidth)"""
        )
        red = page.eval_on_selector_all(".tile", RED_TILES)
        for pick, is_red in zip(page.query_selector_all(".pick"), red, strict=True):
            if is_red:
                pick.click()
        if self.ranked in (0, 3):
            page.screenshot(path=self._shots / f"page-{self.ranked}.png")
        shown = page.query_selector("#grid").evaluate_handle("grid => grid.firstChild")
        page.keyboard.press("Enter")
        self.ranked, self.liked = self.ranked + 1, self.liked + sum(red)
        # until the next group, or the waiting
        page.wait_for_function(
            "tile => !tile.isConnected || document.querySelector('#work').hidden", arg=shown
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/human-red")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    recipe = Recipe.load(
        "pocket-human",
        [
            f"run.dir={arguments.out}",
            f"train.max_minutes={arguments.minutes}",
            f"rewards={{human: {{options: {{port: {arguments.port}}}}}}}",
            f"eval={{every: 0, metrics: ['{__file__}:red_objects', pocket_geneval]}}",
            *arguments.settings,
        ],
    )
    train, held_out = (
        [row for row in rows if row["tag"] in NO_COLOUR]
        for rows in (train_prompts(), test_prompts())
    )
    trainer = Trainer(recipe=recipe, train_dataset=train, eval_dataset=held_out[:240])
    shots = Path(arguments.out)
    shots.mkdir(parents=True, exist_ok=True)
    rater = Rater(f"http://127.0.0.1:{arguments.port}/", arguments.chromium, shots)
    rater.start()
    trainer.train()
    print(f"{trainer.iteration} iterations, {rater.ranked} groups ranked, {rater.liked} clicks")


if __name__ == "__main__":
    main()
