"""A recipe holds every setting of a run and is validated before any compute is spent."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dgpo.algorithms.base import Algorithm, BaseAlgorithm, TrajectoryAlgorithm
from dgpo.errors import UserError
from dgpo.recipe import sections
from dgpo.recipe.conflicts import contradictions
from dgpo.recipe.files import apply_overrides, find_recipe, read_recipe
from dgpo.recipe.plain_yaml import write_yaml
from dgpo.registry import ALGORITHMS, known, resolve, unknown
from dgpo.rewards.settings import AnyReward, RewardSettings, weight_of
from dgpo.secrets import masked
from dgpo.settings import Settings, key_tree, problems, raise_problems
from dgpo.user_classes import unfinished


def _algorithm(value: Any) -> Any:
    """Make an algorithm of ``{name: ..., settings}``; its problems join those of the recipe."""
    if isinstance(value, BaseAlgorithm):
        _fail(unfinished(type(value)))
        return value
    if isinstance(value, type):
        return _made(value, {}, value.__name__)
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        _fail([f"algorithm = {masked(value)!r:.80}: should hold a name and settings"])
    settings = {str(key): setting for key, setting in value.items()}
    name = settings.pop("name", "dgpo")
    if not isinstance(name, str) or not known("algorithm", name):
        _fail([f"algorithm.name: {unknown('algorithm', str(name))}"])
    return _made(resolve("algorithm", name), settings, repr(name))


def _made(kind: Any, settings: Mapping[str, Any], shown: str) -> BaseAlgorithm:
    if not (isinstance(kind, type) and issubclass(kind, BaseAlgorithm)):
        _fail([f"algorithm.name = {shown}: {kind!r:.80} is not a dgpo.algorithms.Algorithm"])
    _fail(unfinished(kind))
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        valid = [*key_tree(Recipe), *key_tree(kind, "algorithm.")]
        _fail(problems(error, valid, "algorithm."))
        raise


def _fail(lines: list[str]) -> Any:
    """Raise a problem with all lines; return if there is no line."""
    if lines:
        # braces: pydantic formats the message with the context
        raise PydanticCustomError("problems", "see the list", {"lines": lines})


def _algorithm_name(kind: type[BaseAlgorithm]) -> str:
    """Return the name under which the class is found again."""
    entry = ALGORITHMS.get(kind.name)
    if entry is not None and entry.path == f"{kind.__module__}:{kind.__qualname__}":
        return kind.name
    module = kind.__module__
    if module.startswith("dgpo_user_"):  # it came from a file, not from the import path
        module = str(sys.modules[module].__file__)
    return f"{module}:{kind.__qualname__}"


class Recipe(Settings):
    """Every setting of a run. A recipe cannot be changed.

    Build one from a file (:meth:`load`), from nested dicts (:meth:`from_dict`), or by keyword.

    >>> Recipe(group_size=24).images_per_iteration
    192
    """

    model: str = Field(default="pocket", min_length=1)
    """The model to train: pocket, a hub id, or a folder with a diffusers pipeline."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of the pipeline's weights; trained weights stay in float32."""
    algorithm: Annotated[SerializeAsAny[BaseAlgorithm], BeforeValidator(_algorithm)] = Field(
        default_factory=lambda: _algorithm("dgpo")
    )
    """The training algorithm: its name, or {name: ..., and its settings} (docs/algorithms.md)."""
    rewards: dict[str, AnyReward] = Field(default_factory=dict)
    """The rewards by name, each with its weight or with settings such as {weight: 1, rank: true}
    (docs/rewards.md)."""
    combine: Literal["sum", "gdpo"] = "sum"
    """How to combine several rewards: add them up (sum), or add up the deviations of each from its
    group's mean (gdpo)."""
    prompts: sections.PromptSettings = sections.PromptSettings()
    data: sections.DataSettings = sections.DataSettings()
    group_size: int = 16
    """The number of pictures of one prompt that are compared with each other; 2 or more."""
    groups_per_iteration: int = Field(default=8, ge=1)
    """The number of prompts, and so of groups, in an iteration."""
    rollout: sections.RolloutSettings = sections.RolloutSettings()
    train: sections.TrainSettings = sections.TrainSettings()
    lora: sections.LoraSettings | None = sections.LoraSettings()
    """The LoRA that is trained; null: train all weights of the denoiser."""
    memory: sections.MemorySettings = sections.MemorySettings()
    compute: sections.ComputeSettings = sections.ComputeSettings()
    ema: sections.EmaSettings = sections.EmaSettings()
    eval: sections.EvalSettings = sections.EvalSettings()
    checkpoint: sections.CheckpointSettings = sections.CheckpointSettings()
    samples: sections.SampleSettings = sections.SampleSettings()
    guards: sections.GuardSettings = sections.GuardSettings()
    seed: int = Field(default=0, ge=0, lt=2**63)
    """The seed of every random number of the run."""
    run: sections.RunSettings = sections.RunSettings()

    @field_validator("group_size")
    @classmethod
    def _a_group_compares(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"group_size = {value}: a group needs 2 or more images to compare")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        _fail(contradictions(self))
        return self

    @classmethod
    def load(cls, path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file and apply overrides.

        Args:
            path_or_name: a file, or the name of a recipe in ``./recipes`` or in the package, with
                or without ``.yaml``.
            overrides: settings to change, each ``a.b=c`` with a value in YAML.

        Raises:
            UserError: names all problems at once, each with its key, its value and what would work.

        >>> recipe = Recipe.load("pocket-geneval", ["train.lr=1e-4", "rollout.steps=20"])
        >>> recipe.train.lr, recipe.rollout.steps, recipe.run.dir
        (0.0001, 20, 'runs/pocket-geneval')
        """
        file = find_recipe(path_or_name)
        data = apply_overrides(read_recipe(file), overrides)
        run = data.get("run")
        if run is None or (isinstance(run, dict) and "dir" not in run):
            data = {**data, "run": {**(run or {}), "dir": f"runs/{file.stem}"}}
        recipe = cls.from_dict(data, f"recipe {file}")
        if recipe.data.preferences is None:
            missing = []
            if not recipe.rewards:
                missing.append("rewards is missing: name what to learn, e.g. {pocket_geneval: 1.0}")
            if recipe.prompts.train is None:
                missing.append(
                    "prompts.train is missing: give a file, or a set such as pocket-geneval/train"
                )
            raise_problems(missing, f"recipe {file}")
        return recipe

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Validate nested dicts.

        Args:
            data: the settings; what is left out has its default.
            where: what the message of an error calls them.

        Raises:
            UserError: names all problems at once, each with its key, its value and what would work.

        >>> Recipe.from_dict({"algorithm": {"name": "dgpo", "beta": 50}}).algorithm.beta
        50.0
        >>> Recipe.from_dict({"train": {"learning_rate": 1e-4}})
        Traceback (most recent call last):
            ...
        dgpo.errors.UserError: recipe: unknown key train.learning_rate (did you mean train.lr?)
        """
        if not isinstance(data, Mapping):
            raise UserError(f"{where}: needs keys and values, got {masked(data)!r:.80}")
        odd = [f"key {key!r} is not a text" for key in data if not isinstance(key, str)]
        raise_problems(odd, where)
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            rewards = data.get("rewards")
            names = rewards if isinstance(rewards, Mapping) else ()
            own = [key for name in names for key in key_tree(RewardSettings, f"rewards.{name}.")]
            raise_problems(problems(error, [*key_tree(cls), *own]), where)
            raise

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested data that :meth:`from_dict` reads back to an equal recipe."""
        data = self.model_dump(mode="json")
        name = _algorithm_name(type(self.algorithm))
        return {**data, "algorithm": {"name": name, **data["algorithm"]}}

    def to_yaml(self) -> str:
        """Return every setting as YAML, defaults included."""
        return write_yaml(self.to_dict())

    def rows_at_once(self, device: str) -> int | None:
        """Return how many samples a training pass of one process has; None for all that it has.

        Args:
            device: the kind of the device, such as ``"cpu"`` or ``"cuda"``.
        """
        size = self.train.micro_batch
        if size != "auto":
            return size
        if device == "cpu":
            return None
        group = self.algorithm.trained_per_group or self.group_size
        return max(1, sections.ROWS_AT_ONCE // group) * group

    @property
    def updates_per_iteration(self) -> int:
        """The optimiser steps of an iteration in which the rewards of every group differ."""
        if isinstance(self.algorithm, TrajectoryAlgorithm):
            return self.algorithm.updates
        if self.train.optimizer_step == "timestep" and isinstance(self.algorithm, Algorithm):
            return self.algorithm.timesteps.count * self.train.inner_epochs
        return self.train.inner_epochs

    @property
    def optimizer_steps(self) -> int:
        """The optimiser steps of the run if the rewards of every group differ."""
        return self.train.iterations * self.updates_per_iteration

    @property
    def prompt_cache(self) -> str | None:
        """The folder of prompt embeddings, if there is one."""
        if self.memory.prompt_cache is None and self.memory.free_text_encoders:
            return str(Path(self.run.dir) / "prompt_embeddings")
        return self.memory.prompt_cache

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of each reward, by its name."""
        return {name: weight_of(reward) for name, reward in self.rewards.items()}

    @property
    def overlaps_rewards(self) -> bool:
        """Return whether rewards are asked while pictures are sampled or the policy is trained."""
        asked, batch = self.rollout.overlap_rewards, self.rollout.batch
        several = batch is not None and batch < self.images_per_iteration
        return asked is not False and (several or self.rollout.ahead > 0)

    @property
    def eval_sampling(self) -> sections.EvalSampling:
        """How evaluations sample."""
        own, rollout = self.eval, self.rollout
        guidance = rollout.guidance_scale if own.guidance_scale is None else own.guidance_scale
        scheduler, steps = own.scheduler or rollout.scheduler, own.steps or rollout.steps
        return sections.EvalSampling(scheduler, steps, guidance, own.batch)

    def grid_due(self, iteration: int) -> bool:
        """Return whether to draw a grid of pictures after an iteration; iterations count from 1."""
        own = self.samples.every
        return sections.is_multiple(iteration, self.eval.every if own is None else own)

    @property
    def images_per_iteration(self) -> int:
        """The number of pictures that an iteration trains on."""
        return self.group_size * self.groups_per_iteration

    @property
    def images_sampled(self) -> int:
        """The number of pictures that an iteration samples; 0 where it trains on ranked groups."""
        return 0 if self.data.preferences is not None else self.images_per_iteration
