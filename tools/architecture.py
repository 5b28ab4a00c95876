"""The order of the rooms of ``src/dgpo``: what each one knows, and that imports point down.

    python tools/architecture.py            # draws the picture and writes the table of the page
    python tools/architecture.py --check    # writes nothing; ends with 1 if anything is wrong

Rooms are the files and folders of the package, and the folders inside ``models`` and ``rewards``. A
room may import those that stand before it in ``ROOMS``, wherever in a file the import stands.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SOURCE = HERE / "src" / "dgpo"
PAGE = HERE / "docs" / "architecture.md"
PICTURE = HERE / "docs" / "images" / "architecture.svg"
TOP = "the package"
"""What ``dgpo/__init__.py`` and ``__main__.py`` are: names for users, above all rooms."""

ROOMS: dict[str, str] = {
    "errors": "`UserError`, the one error that users are told.",
    "secrets": "What must not be shown or written: tokens and keys.",
    "interrupts": "Ctrl-C and SIGTERM, held back while something must not be cut off.",
    "user_code": "Code that is not ours: what it changes of the process is put back.",
    "disk": "Files that are written whole or not at all.",
    "settings": "Frozen settings, and one line that puts a wrong one right.",
    "registry": "The names that recipes take, and where each one lives; it reads `registry.yaml`.",
    "user_classes": "What a user's class is refused for: a misspelt hook, an option.",
    "reserved": "Arguments of a pipeline's call that the run sets itself, and by which setting.",
    "pictures": "The gate for picture files: any mode and turn becomes RGB, or one clear error.",
    "media": "Videos and sounds: what rewards are given of them, and their files.",
    "core": "Groups, noising processes, noise levels, SDE steps: pure functions of tensors.",
    "pocket": "The small models inside the package, their prompts and their verifiers.",
    "prompts": "Prompt rows, from files, data sets and functions.",
    "preferences": "Ranked groups of pictures, as they lie on disk.",
    "algorithms": "One file a method: its settings, advantages and loss. They never see a model.",
    "distributed": "Processes, sharding, signals: they know no recipe, model or reward.",
    "models/samplers": "diffusers' samplers by name, and stochastic ones.",
    "models/weights": "LoRA, snapshots, and what is restored after a pass.",
    "models/pipeline": "A diffusers pipeline as it is: rollouts, and one point of its loop again.",
    "models": "The policy: a pipeline with its trained weights and their averages.",
    "rewards": "What a reward is, how it is asked, and how several are mixed.",
    "rewards/shipped": "The rewards that have a name, one file each.",
    "recipe": "Every setting of a run, validated; all that is wrong at once.",
    "serve": "The reward server.",
    "ranking": "The page on which people rank pictures, and the reward that asks them.",
    "evaluation": "Held-out pictures, benchmarks and their intervals.",
    "rollouts": "Rollouts by another program.",
    "generators": "Prompt sets that are made: GenEval's and signs.",
    "run": "The run's folder: metrics, pictures, the manifest, the model card.",
    "training": "The parts of the loop: collect, score, update, watch, save.",
    "exporting": "`dgpo export`: a run's weights as other programs read them.",
    "trainer": "The loop.",
    "check": "`dgpo check`: a model is trained for a moment, to prove that it can be.",
    "planning": "`dgpo plan` and `dgpo bench`: passes and memory, before a run and as measured.",
    "comparison": "`dgpo compare`: recipes against each other.",
    "cli": "The command `dgpo`.",
}
"""Every room with a sentence, each after all that it may import."""
GROUND = (
    "errors",
    "secrets",
    "interrupts",
    "user_code",
    "disk",
    "settings",
    "registry",
    "user_classes",
    "reserved",
    "pictures",
    "media",
)
"""Rooms that all others may use; the picture shows them as one."""


@dataclass(frozen=True)
class House:
    """The files of the package and what they import.

    Args:
        source: the folder of the package.
        rooms: the names of the rooms, each after all that it may import.
    """

    source: Path
    rooms: tuple[str, ...] = tuple(ROOMS)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The modules by their dotted names."""
        package = self.source.name
        found = {}
        for file in sorted(self.source.rglob("*.py")):
            parts = file.relative_to(self.source).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
        return found

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The modules that each module imports, wherever in its file, for types too."""
        return {module: set(self._imported(module, types=True)) for module in self.files}

    @cached_property
    def loaded(self) -> dict[str, set[str]]:
        """``imports`` without those that only a type checker reads."""
        return {module: set(self._imported(module, types=False)) for module in self.files}

    def _imported(self, module: str, types: bool) -> Iterator[str]:
        tree = ast.parse(self.files[module].read_text(encoding="utf-8"))
        skipped = set()
        if not types:
            guards = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
            guards = [n for n in guards if "TYPE_CHECKING" in ast.unparse(n.test)]
            skipped = {n for guard in guards for part in guard.body for n in ast.walk(part)}
        for node in ast.walk(tree):
            if node in skipped:
                continue
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parent = node.module or ""
                if node.level:  # from . import x
                    parts = module.split(".")
                    kept = len(parts) - node.level + (self.files[module].stem == "__init__")
                    parent = ".".join([*parts[:kept], *filter(None, [node.module])])
                inside = [f"{parent}.{alias.name}" for alias in node.names]
                wanted = [name if name in self.files else parent for name in inside]
            yield from (name for name in wanted if name in self.files and name != module)

    def room(self, module: str) -> str:
        """The room of a module: the longest name that its place begins with.

        Raises:
            ValueError: it stands in none.
        """
        place = "/".join(module.split(".")[1:])
        if place in ("", "__main__"):
            return TOP
        fits = [room for room in self.rooms if f"{place}/".startswith(f"{room}/")]
        if not fits:
            raise ValueError(f"{module} stands in no room: add it to ROOMS in {__file__}")
        return max(fits, key=len)

    @cached_property
    def arrows(self) -> dict[str, set[str]]:
        """The rooms that each room imports."""
        found: dict[str, set[str]] = {room: set() for room in (*self.rooms, TOP)}
        for module, others in self.imports.items():
            found[self.room(module)] |= {self.room(other) for other in others}
        return {room: others - {room} for room, others in found.items()}

    @cached_property
    def upward(self) -> list[str]:
        """The imports of a room that stands above, one line each."""
        height = {room: place for place, room in enumerate((*self.rooms, TOP))}
        return [
            f"{module} imports {other}: {self.room(other)} stands above {self.room(module)}"
            for module, others in self.imports.items()
            for other in sorted(others)
            if height[self.room(other)] > height[self.room(module)]
        ]

    @cached_property
    def circles(self) -> list[list[str]]:
        """The files that import each other, directly or through others, when they are run."""
        return circles(self.loaded)

    @property
    def figures(self) -> str:
        """Rooms, files and imports in one line, and what must be 0."""
        count = sum(map(len, self.imports.values()))
        return (
            f"{len(self.rooms)} rooms, {len(self.files)} files, {count} imports between files, "
            f"{len(self.upward)} upward, {len(self.circles)} circles"
        )


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """A graph without circles and without the arrows that others imply."""
    below: dict[str, set[str]] = {}

    def reach(node: str) -> set[str]:
        if node not in below:
            below[node] = {far for near in graph[node] for far in {near, *reach(near)}}
        return below[node]

    return {
        node: {one for one in others if not any(one in reach(other) for other in others)}
        for node, others in graph.items()
    }


def shown(house: House) -> dict[str, set[str]]:
    """What the picture shows: rooms from top to bottom, the ground as one, no implied arrow."""
    name = {room: "ground" if room in GROUND else room for room in house.rooms}
    graph: dict[str, set[str]] = {name[room]: set() for room in reversed(house.rooms)}
    for room in house.rooms:
        graph[name[room]] |= {name[other] for other in house.arrows[room]} - {name[room]}
    return reduced(graph)


# The picture: nodes in layers, each above all that it imports; long arrows pass through the layers
# between by nodes of no width; the order in a layer is that with the fewest crossings found.

WIDTH, HEIGHT, GAP, RISE = 148, 36, 22, 76
"""Pixels of a box, between two, and from layer to layer."""
_STYLE = """\
<style>
  text { font: 600 15px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #12263f }
  .small { font-size: 12px; font-weight: 400; fill: #40566f }
  rect { fill: #dbe7f6; stroke: #4f7cb0; stroke-width: 1.4 }
  .ground rect { fill: #e6e3da; stroke: #8d8672 }
  .loop rect { fill: #ffe1b8; stroke: #c07a1c }
  path { fill: none; stroke: #7f8ea3; stroke-width: 1.6 }
  marker path { fill: #7f8ea3; stroke: none }
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" \
orient="auto" markerUnits="userSpaceOnUse"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>"""


def _layers(graph: Mapping[str, set[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """The nodes of each layer from the bottom, with those that arrows pass through, and the arrows
    as lists of nodes from top to bottom."""
    height: dict[str, int] = {}

    def of(node: str) -> int:
        if node not in height:
            height[node] = 1 + max((of(other) for other in graph[node]), default=-1)
        return height[node]

    layers: list[list[str]] = [[] for _ in range(1 + max(map(of, graph)))]
    for node in graph:
        layers[height[node]].append(node)
    routes = []
    for node, others in graph.items():
        for other in sorted(others):
            between = range(height[node] - 1, height[other], -1)
            passed = [f"{node}>{other}>{level}" for level in between]
            for level, one in zip(between, passed, strict=True):
                layers[level].append(one)
            routes.append([node, *passed, other])
    return layers, routes


def _crossings(layers: list[list[str]], down: Mapping[str, list[str]]) -> int:
    total = 0
    for upper, lower in zip(layers[1:], layers, strict=False):
        place = {node: at for at, node in enumerate(lower)}
        ends = [sorted(place[other] for other in down[node]) for node in upper]
        for at, one in enumerate(ends):
            total += sum(a > b for other in ends[at + 1 :] for a in one for b in other)
    return total


def _ordered(
    layers: list[list[str]], up: Mapping[str, list[str]], down: Mapping[str, list[str]]
) -> list[list[str]]:
    """Barycentre sweeps up and down; the order with the fewest crossings wins."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers, down)
    for sweep in range(60):
        upwards = sweep % 2 == 0
        near, step = (down, -1) if upwards else (up, 1)
        levels = range(1, len(layers)) if upwards else range(len(layers) - 2, -1, -1)
        for level in levels:
            fixed = {node: float(at) for at, node in enumerate(layers[level + step])}
            own = {node: float(at) for at, node in enumerate(layers[level])}
            middle = {n: _mean([fixed[o] for o in near[n]], own[n]) for n in layers[level]}
            layers[level] = sorted(own, key=lambda n: (middle[n], own[n]))
        if (count := _crossings(layers, down)) < fewest:
            best, fewest = [list(layer) for layer in layers], count
    return best


def _placed(
    layers: list[list[str]], up: Mapping[str, list[str]], down: Mapping[str, list[str]]
) -> dict[str, float]:
    """The middle of each node: near the mean of its neighbours, in the order of its layer."""
    x = {node: float((WIDTH + GAP) * at) for layer in layers for at, node in enumerate(layer)}
    for sweep in range(80):
        for layer in layers if sweep % 2 else reversed(layers):
            wish = []
            for node in layer:
                near = [*down[node], *up[node]] if sweep > 40 else (down if sweep % 2 else up)[node]
                wish.append(_mean([x[other] for other in near], x[node]))
            offsets = [0.0]
            for left, right in pairwise(layer):
                offsets.append(offsets[-1] + _half(left) + _half(right) + GAP)
            free = _rising([w - o for w, o in zip(wish, offsets, strict=True)])
            x |= {n: f + o for n, f, o in zip(layer, free, offsets, strict=True)}
    left = min(x[node] - _half(node) for node in x)
    return {node: value - left + GAP for node, value in x.items()}


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _half(node: str) -> float:
    return 0.0 if ">" in node else (WIDTH * 4.6 if node == "ground" else WIDTH) / 2


def _rising(values: list[float]) -> list[float]:
    """The rising sequence that is nearest in squares: neighbours that fall are pooled."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, n), (a, m) = pools.pop(), pools.pop()
            pools.append(((a * m + b * n) / (m + n), m + n))
    return [value for value, count in pools for _ in range(count)]


def picture(house: House) -> str:
    """The rooms as an SVG that is legible on light and on dark pages."""
    graph = shown(house)
    layers, routes = _layers(graph)
    down: dict[str, list[str]] = {node: [] for layer in layers for node in layer}
    up: dict[str, list[str]] = {node: [] for layer in layers for node in layer}
    for route in routes:
        for above, below in pairwise(route):
            down[above].append(below)
            up[below].append(above)
    layers = _ordered(layers, up, down)
    x = _placed(layers, up, down)
    y = {
        node: GAP + RISE * (len(layers) - 1 - level)
        for level, layer in enumerate(layers)
        for node in layer
    }
    wide = round(max(x[node] + _half(node) for node in x) + GAP)
    tall = round(max(y.values()) + HEIGHT + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" role="img">',
        "<title>The rooms of dgpo and what they import</title>",
        _STYLE,
        *(_arrow(route, x, y) for route in routes),
        *(_box(node, x[node], y[node]) for node in graph),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _arrow(route: list[str], x: Mapping[str, float], y: Mapping[str, float]) -> str:
    points = [(x[route[0]], y[route[0]] + HEIGHT)]
    for node in route[1:-1]:
        points += [(x[node], y[node]), (x[node], y[node] + HEIGHT)]
    last = route[-1]
    end = x[last] if last != "ground" else min(max(points[-1][0], x[last] - 260), x[last] + 260)
    points.append((end, y[last] - 2))
    drawn = [f"M{points[0][0]:.0f} {points[0][1]:.0f}"]
    for (ax, ay), (bx, by) in pairwise(points):
        bend = (by - ay) / 2
        drawn.append(f"C{ax:.0f} {ay + bend:.0f} {bx:.0f} {by - bend:.0f} {bx:.0f} {by:.0f}")
    return f'<path d="{" ".join(drawn)}" marker-end="url(#tip)"/>'


def _box(node: str, x: float, y: float) -> str:
    kind = {"ground": "ground", "trainer": "loop"}.get(node, "room")
    half = _half(node)
    texts = [f'<text x="{x:.0f}" y="{y + 22:.0f}" text-anchor="middle">{node}</text>']
    if node == "ground":
        inside = ", ".join(GROUND)
        texts = [
            f'<text x="{x:.0f}" y="{y + 15:.0f}" text-anchor="middle">{node}</text>',
            f'<text class="small" x="{x:.0f}" y="{y + 30:.0f}" text-anchor="middle">',
            f"{inside}</text>",
        ]
    box = f'<rect x="{x - half:.0f}" y="{y:.0f}" width="{2 * half:.0f}" height="{HEIGHT}" rx="6"/>'
    return f'<g class="{kind}">{box}{"".join(texts)}</g>'


def table(house: House) -> str:
    """The rooms from top to bottom, a sentence each."""
    rows = [f"| `{room}` | {ROOMS[room]} |" for room in reversed(house.rooms)]
    return "\n".join(["| room of `src/dgpo` | what it knows |", "|---|---|", *rows])


def with_section(page: str, name: str, body: str) -> str:
    """A page whose part between ``<!-- table: NAME -->`` and ``<!-- end -->`` is ``body``.

    Raises:
        ValueError: the page has no such part.
    """
    begin, end = f"<!-- table: {name} -->", "<!-- end -->"
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"no part between {begin} and {end}")
    return f"{before}{begin}\n{body}\n{end}{rest.partition(end)[2]}"


def pages(house: House) -> dict[Path, str]:
    """The files that this program writes, as they should be."""
    text = with_section(PAGE.read_text(encoding="utf-8"), "rooms", table(house))
    return {PICTURE: picture(house), PAGE: text}


def main(arguments: list[str] | None = None) -> int:
    """Draw and write, or only check; the number that the process ends with."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(arguments)
    house = House(SOURCE)
    wrong = [*house.upward, *(f"a circle: {', '.join(one)}" for one in house.circles)]
    missing = [room for room in house.rooms if not any(house.room(m) == room for m in house.files)]
    wrong += [f"ROOMS has {room}, which is not there" for room in missing]
    if not wrong:
        for file, text in pages(house).items():
            if given.check and (not file.exists() or file.read_text(encoding="utf-8") != text):
                wrong.append(f"{file.relative_to(HERE)} is old: run python tools/architecture.py")
            elif not given.check:
                file.write_text(text, encoding="utf-8")
    print(house.figures)
    for line in wrong:
        print(line, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
