"""What a :class:`dgpo.trainer.Trainer` is given beside a recipe, written into the recipe.

The recipe in a run folder is what was run: names and files as they were given, functions by the
path under which they can be imported, and nothing for data that has no name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from typing_extensions import TypedDict

from dgpo.algorithms.base import BaseAlgorithm
from dgpo.errors import UserError
from dgpo.models.load import Precision
from dgpo.recipe import Recipe
from dgpo.recipe.files import apply_overrides, read_recipe
from dgpo.settings import key_tree, suggest_key
from dgpo.training.callbacks import Callback


def is_pipeline(model: Any) -> bool:
    """Return whether ``model`` is a pipeline itself rather than what a recipe calls one."""
    return model is not None and not isinstance(model, (str, Path))


@dataclass(frozen=True)
class Given:
    """What a trainer is given beside its recipe, as its arguments say; None for the recipe's."""

    model: Any = None
    reward_funcs: Any = None
    train_dataset: Any = None
    eval_dataset: Any = None
    algorithm: BaseAlgorithm | None = None
    report_to: Any = None


class Options(TypedDict, total=False):
    """The arguments of a trainer that are given by name alone."""

    resume: bool | Literal["last"] | str | Path
    callbacks: Callback | type[Callback] | str | Iterable[Callback | type[Callback] | str]
    report_to: str | Sequence[Any]


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """See that a trainer is given no arguments that it does not take.

    Raises:
        UserError: it is; the message names the recipe's key of that meaning.
    """
    known = Options.__optional_keys__
    for name in options:
        if name not in known:
            hint = suggest_key(name, key_tree(Recipe))
            raise UserError(
                f"Trainer({name}=...): no such argument; settings are given by recipe=Recipe(...), "
                f"a recipe's name, a file or nested dicts{hint}"
            )


def going_on(recipe: Any, resume: bool | str | Path) -> Any:
    """Find the recipe of the run that goes on.

    Args:
        recipe: what was given to the trainer.
        resume: True: in the recipe's run folder; ``"last"``: in the folder beside it that was
            written to last; a path: in exactly that run folder, whose recipe is read if none is
            given.

    Raises:
        UserError: there is no run.
    """
    if isinstance(resume, bool):
        return recipe
    if not isinstance(resume, (str, Path)) or not str(resume):
        raise UserError(f"resume = {resume!r:.80}: give True, False, 'last' or a run folder")
    folder = Path(resume).expanduser()
    if resume == "last":
        beside = Path(_recipe_of(recipe).run.dir).parent
        runs = [file.parent for file in beside.glob("*/recipe.yaml")]
        if not runs:
            raise UserError(f"resume = 'last': {beside} holds no run; start without resume")
        folder = max(runs, key=_written)
    of_run = recipe_of_run(folder)
    recipe = of_run if recipe is None else _recipe_of(recipe)
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": str(folder)})})


def recipe_of_run(folder: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a run folder. It may lack what was given in Python and has no name.

    Args:
        folder: a run folder.
        overrides: ``a.b=c``, the values in YAML.

    Raises:
        UserError: there is no run, or as :meth:`Recipe.from_dict`.
    """
    file = Path(folder).expanduser() / "recipe.yaml"
    if not file.is_file():
        raise UserError(
            f"{str(folder)!r} holds no run to go on with (no recipe.yaml); give a run's folder, or "
            "resume=True for the recipe's run.dir"
        )
    return Recipe.from_dict(apply_overrides(read_recipe(file), overrides), f"recipe {file}")


def _written(folder: Path) -> float:
    """When a run was written to last."""
    return max(file.stat().st_mtime for file in folder.iterdir())


def _recipe_of(recipe: Any) -> Recipe:
    if isinstance(recipe, (str, Path)):
        return Recipe.load(recipe)
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe)
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise UserError(
            f"recipe = {recipe!r:.80}: give a Recipe, its name or file, or nested dicts"
        )
    return recipe


def full_recipe(recipe: Any, given: Given) -> Recipe:
    """The recipe with what was given beside it put in, validated as a whole.

    Args:
        recipe: a :class:`Recipe`, its name or file, nested dicts, or None for the defaults.
        given: what goes before it.

    Raises:
        UserError: see :meth:`Recipe.from_dict`.
    """
    recipe, model = _recipe_of(recipe), given.model
    if is_pipeline(model) and not isinstance(getattr(model, "components", None), Mapping):
        kind = type(model).__name__
        raise UserError(f"model: {kind} is no diffusers pipeline; give one, or a name or folder")
    changes: dict[str, Any] = {}
    if is_pipeline(model):
        # from_pretrained keeps a Path as a Path
        changes["model"] = str(getattr(model.config, "_name_or_path", None) or type(model).__name__)
        precision = str(getattr(model, "dtype", "")).removeprefix("torch.")
        if precision in get_args(Precision):
            changes["precision"] = precision
    elif model is not None:
        changes["model"] = str(model)
    if given.algorithm is not None:
        changes["algorithm"] = given.algorithm
    if given.reward_funcs is not None:
        changes["rewards"] = _named(given.reward_funcs)
    sources = {"train": given.train_dataset, "eval": given.eval_dataset}
    prompts = {key: _source(value) for key, value in sources.items() if value is not None}
    if prompts:
        changes["prompts"] = {**dict(recipe.prompts), **prompts}
    if given.report_to is not None:
        changes["run"] = {**dict(recipe.run), "loggers": _names(given.report_to)}
    # the fields as they are, not their plain data: an algorithm may be of a class without a path
    return Recipe.from_dict({**dict(recipe), **changes}) if changes else recipe


def _names(report_to: Any) -> list[Any]:
    """TRL's ``report_to`` as ``run.loggers``: its ``none`` is an empty list."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    return [] if names == ["none"] else names


def _named(rewards: Any) -> dict[str, float]:
    if isinstance(rewards, Mapping):
        return {_path(reward): weight for reward, weight in rewards.items()}
    if isinstance(rewards, str) or callable(rewards):
        rewards = [rewards]
    return {_path(reward): 1.0 for reward in rewards}


def _path(reward: Any) -> str:
    if isinstance(reward, str):
        return reward
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def _source(prompts: Any) -> str | None:
    return str(prompts) if isinstance(prompts, (str, Path)) else None
