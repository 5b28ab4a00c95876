"""Recipes: every setting of a run, validated before any compute is spent."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
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
from dgpo.recipe_errors import key_tree, problems, raise_problems
from dgpo.recipe_files import apply_overrides, find_recipe, read_recipe
from dgpo.recipe_sections import (
    CheckpointSettings,
    DataSettings,
    EmaSettings,
    EvalSettings,
    GuardSettings,
    LoraSettings,
    MemorySettings,
    PromptSettings,
    RolloutSettings,
    RunSettings,
    SampleSettings,
    Section,
    TrainSettings,
)
from dgpo.registry import ALGORITHMS, known, resolve, unknown
from dgpo.rewards.terms import AnyReward, RewardTerm, used, weight_of

_OWNED_CALL_KEYS = {
    "true_cfg_scale": "rollout.guidance_scale",
    "num_inference_steps": "rollout.steps",
    "sigmas": "rollout.steps",
    "timesteps": "rollout.steps",
    "prompt": "prompts.train",
    "prompt_embeds": "prompts.train",
    "num_images_per_prompt": "group_size",
    "generator": "seed",
    "latents": "seed",
}


def _algorithm(value: Any) -> Any:
    """An algorithm from ``{name: ..., settings}``; its own problems are handed on one by one."""
    if isinstance(value, BaseAlgorithm):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        _fail([f"algorithm = {value!r:.80}: should hold a name and settings"])
    settings = {str(key): setting for key, setting in value.items()}
    name = settings.pop("name", "dgpo")
    if not isinstance(name, str) or not known("algorithm", name):
        _fail([f"algorithm.name: {unknown('algorithm', str(name))}"])
    kind = resolve("algorithm", name)
    if not (isinstance(kind, type) and issubclass(kind, BaseAlgorithm)):
        _fail([f"algorithm.name = {name!r}: {kind!r:.80} is no dgpo.algorithms.Algorithm"])
    try:
        return kind(**settings)
    except ValidationError as error:
        valid = [*key_tree(Recipe), *key_tree(kind, "algorithm.")]
        _fail(problems(error, valid, "algorithm."))


def _fail(lines: list[str]) -> Any:
    # braces: pydantic formats the message with the context
    raise PydanticCustomError("problems", "see the list", {"lines": lines})


def _algorithm_name(kind: type[BaseAlgorithm]) -> str:
    """The name that finds this class again."""
    if ALGORITHMS.get(kind.name) == f"{kind.__module__}:{kind.__qualname__}":
        return kind.name
    module = kind.__module__
    if module.startswith("dgpo_user_"):  # it came from a file, not from the import path
        module = str(sys.modules[module].__file__)
    return f"{module}:{kind.__qualname__}"


class Recipe(Section):
    """Every setting of a run, immutable.

    Build one from a file (:meth:`load`), from nested dicts (:meth:`from_dict`), or by keyword.
    """

    model: str = Field(default="pocket", min_length=1)
    """``pocket``, a hub id, or a folder with a diffusers pipeline."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    algorithm: Annotated[SerializeAsAny[BaseAlgorithm], BeforeValidator(_algorithm)] = Field(
        default_factory=lambda: _algorithm("dgpo")
    )
    rewards: dict[str, AnyReward] = Field(default_factory=dict)
    """Names with a weight each, or with the settings of a RewardTerm."""
    combine: Literal["sum", "gdpo"] = "sum"
    """Several rewards: add them up, or (gdpo) the deviations of each from its group's mean."""
    prompts: PromptSettings = PromptSettings()
    data: DataSettings = DataSettings()
    group_size: int = 16
    """Images of one prompt that are compared with each other."""
    groups_per_iteration: int = Field(default=8, ge=1)
    rollout: RolloutSettings = RolloutSettings()
    train: TrainSettings = TrainSettings()
    lora: LoraSettings | None = LoraSettings()
    """null: full fine-tuning of the denoiser."""
    memory: MemorySettings = MemorySettings()
    ema: EmaSettings = EmaSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    samples: SampleSettings = SampleSettings()
    guards: GuardSettings = GuardSettings()
    seed: int = Field(default=0, ge=0, lt=2**63)
    run: RunSettings = RunSettings()

    @field_validator("group_size")
    @classmethod
    def _a_group_compares(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"group_size = {value}: a group needs 2 or more images to compare")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        lines = [
            *self._unknown_rewards(),
            *self._timesteps(),
            *self._trajectory(),
            *self._stochastic(),
            *self._offline(),
            *self._conflicts(),
        ]
        if lines:
            _fail(lines)
        return self

    def _unknown_rewards(self) -> list[str]:
        named = [("rewards", n) for n, r in self.rewards.items() if not used(r)]
        named += [(f"rewards.{n}.use", used(r)) for n, r in self.rewards.items() if used(r)]
        named += [("eval.metrics", n) for n in self.eval.metrics]
        return [f"{key}: {unknown('reward', n)}" for key, n in named if not known("reward", n)]

    def _timesteps(self) -> list[str]:
        if not isinstance(self.algorithm, Algorithm):
            return []
        choice, levels = self.algorithm.timesteps, self.rollout.steps
        if choice.indices is not None and choice.indices[1] >= levels:
            return [
                f"algorithm.timesteps.indices = {list(choice.indices)}: rollout.steps = {levels} "
                f"has levels 0 to {levels - 1} only; lower the last index or raise rollout.steps"
            ]
        if choice.indices is None and choice.count > levels:
            return [
                f"algorithm.timesteps.count = {choice.count}: rollout.steps = {levels} has no more "
                f"than {levels} levels; lower the count or raise rollout.steps"
            ]
        return []

    def _trajectory(self) -> list[str]:
        """What a policy gradient on the steps of the rollout needs."""
        algorithm, rollout, groups = self.algorithm, self.rollout, self.groups_per_iteration
        if not isinstance(algorithm, TrajectoryAlgorithm):
            return []
        lines, name = [], algorithm.name
        if rollout.sde is not None:
            lines.append(f"rollout.sde: the sampler of {name} is algorithm.sde; use null")
        plain = "ddim" if algorithm.sde.kind == "ddim" else "euler"
        if rollout.scheduler not in (None, plain):
            lines.append(
                f"rollout.scheduler = {rollout.scheduler!r}: the sampler of {name} is "
                f"algorithm.sde; use null or {plain}, for evaluations alone"
            )
        if rollout.switch_to_old_after is not None:
            lines.append(
                f"rollout.switch_to_old_after = {rollout.switch_to_old_after}: {name} learns from "
                "the policy's own steps; use null"
            )
        if rollout.ahead:
            lines.append(
                f"rollout.ahead = {rollout.ahead}: {name} learns from the policy's own steps; use 0"
            )
        if self.train.optimizer_step != "iteration":
            lines.append(
                f"train.optimizer_step = {self.train.optimizer_step!r}: {name} trains all steps of "
                "a picture together; use iteration, and algorithm.updates for more steps"
            )
        if groups % algorithm.updates:
            lines.append(
                f"algorithm.updates = {algorithm.updates}: groups_per_iteration = {groups} cannot "
                "be split into so many equal parts; let it divide the groups"
            )
        if rollout.steps < 2:
            lines.append("rollout.steps = 1: the last step is never trained; use 2 or more")
        elif algorithm.window is not None and (problem := algorithm.window.problem(rollout.steps)):
            lines.append(problem)
        return lines

    def _stochastic(self) -> list[str]:
        """What rollouts with noise need, beside an algorithm on noised samples."""
        rollout = self.rollout
        if rollout.sde is None or not isinstance(self.algorithm, Algorithm):
            return []
        if rollout.scheduler is not None:
            return [
                f"rollout.sde: it samples instead of rollout.scheduler = {rollout.scheduler!r}; "
                "use null for one of them"
            ]
        return ["rollout.sde: the last step adds no noise; rollout.steps = 1 leaves none"] * (
            rollout.steps < 2
        )

    def _offline(self) -> list[str]:
        """What training on a folder of groups leaves without a meaning."""
        data, rollout, name = self.data, self.rollout, self.algorithm.name
        if data.preferences is None:
            wrong = data.pick != "all"
            return [f"data.pick = {data.pick!r}: there is no data.preferences"] * wrong
        where = f"data.preferences = {data.preferences!r}: "
        lines = []
        if not isinstance(self.algorithm, Algorithm):
            lines.append(f"{where}{name} learns from the steps of its own rollouts; use dgpo")
        unused = {"switch_to_old_after": None, "sde": None, "ahead": 0, "engine": None}
        lines += [
            f"{where}nothing is sampled, so rollout.{key} means nothing; leave it out"
            for key, default in unused.items()
            if getattr(rollout, key) != default
        ]
        return lines

    def _remote(self) -> list[str]:
        """What an engine in another process cannot do."""
        rollout, where = self.rollout, f"rollout.engine = {self.rollout.engine!r}: "
        if rollout.engine is None:
            return []
        lines = []
        if isinstance(self.algorithm, TrajectoryAlgorithm):
            lines.append(f"{where}{self.algorithm.name} needs the steps, which it does not keep")
        if rollout.sde is not None:
            lines.append(f"{where}rollout.sde samples in the run itself; use null for one of them")
        if self.lora is None:
            lines.append(f"{where}what travels is a LoRA, and lora: null trains none")
        return lines

    def _conflicts(self) -> list[str]:
        lines = [
            f"rollout.call.{key}: the run sets it itself; use {_OWNED_CALL_KEYS[key]}"
            for key in self.rollout.call
            if key in _OWNED_CALL_KEYS
        ]
        lines += self._remote()
        if self.rollout.ahead and self.rollout.overlap_rewards:
            lines.append(
                f"rollout.ahead = {self.rollout.ahead}: rewards are asked when their iteration is "
                "due; set rollout.overlap_rewards to null or false"
            )
        if self.combine == "gdpo" and getattr(self.algorithm, "advantage_std", "") == "group":
            lines.append(
                "combine = 'gdpo': it ends with one deviation for the whole batch, and that of "
                "each group would undo it; set algorithm.advantage_std to batch"
            )
        trained = self.algorithm.trained_per_group
        if trained is not None and trained > self.group_size:
            lines.append(
                f"group_size = {self.group_size}: the algorithm trains {trained} images of each "
                "group; raise group_size or lower that setting of the algorithm"
            )
        if self.memory.quantization is not None and self.lora is None:
            lines.append(
                f"memory.quantization = {self.memory.quantization!r}: lora: null trains all "
                "weights, and rounded ones cannot be; use a LoRA, or null"
            )
        steps = self.train.iterations * self.updates_per_iteration
        if self.train.warmup >= steps:
            lines.append(
                f"train.warmup = {self.train.warmup}: the run has only {steps} optimiser steps; "
                "lower it or raise train.iterations"
            )
        return lines

    @classmethod
    def load(cls, path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file and apply overrides.

        Args:
            path_or_name: a file, or the name of a recipe in ``./recipes`` or in the package, with
                or without ``.yaml``.
            overrides: ``a.b=c``, the values in YAML.

        Raises:
            UserError: all that is wrong with it, with the keys, the values and what would work.
        """
        file = find_recipe(path_or_name)
        data = apply_overrides(read_recipe(file), overrides)
        run = data.get("run")
        if run is None or (isinstance(run, dict) and "dir" not in run):
            data = {**data, "run": {**(run or {}), "dir": f"runs/{file.stem}"}}
        recipe = cls.from_dict(data, f"recipe {file}")
        missing = []
        offline = recipe.data.preferences is not None
        if not recipe.rewards and not offline:
            missing.append("rewards is missing: what shall be learned? e.g. {pocket_geneval: 1.0}")
        if recipe.prompts.train is None and not offline:
            missing.append("prompts.train is missing: a file or a set such as pocket-geneval/train")
        raise_problems(missing, f"recipe {file}")
        return recipe

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Validate nested dicts.

        Raises:
            UserError: all problems at once, each with its key, the value got and what would work.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"{where}: needs keys and values, got {data!r:.80}")
        odd = [f"key {key!r} is no text" for key in data if not isinstance(key, str)]
        raise_problems(odd, where)
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            rewards = data.get("rewards")
            names = rewards if isinstance(rewards, Mapping) else ()
            own = [key for name in names for key in key_tree(RewardTerm, f"rewards.{name}.")]
            raise_problems(problems(error, [*key_tree(cls), *own]), where)
            raise

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data that :meth:`from_dict` reads back to an equal recipe."""
        data = self.model_dump(mode="json")
        name = _algorithm_name(type(self.algorithm))
        return {**data, "algorithm": {"name": name, **data["algorithm"]}}

    def to_yaml(self) -> str:
        """The resolved recipe: every key, defaults included."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @property
    def updates_per_iteration(self) -> int:
        """Optimiser steps of an iteration in which every group has spread."""
        if isinstance(self.algorithm, TrajectoryAlgorithm):
            return self.algorithm.updates
        if self.train.optimizer_step == "timestep" and isinstance(self.algorithm, Algorithm):
            return self.algorithm.timesteps.count
        return 1

    @property
    def prompt_cache(self) -> str | None:
        """The folder of prompt embeddings, if there is one."""
        if self.memory.prompt_cache is None and self.memory.free_text_encoders:
            return str(Path(self.run.dir) / "prompt_embeddings")
        return self.memory.prompt_cache

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of each reward."""
        return {name: weight_of(reward) for name, reward in self.rewards.items()}

    @property
    def overlaps_rewards(self) -> bool:
        """Whether rewards are asked while the next pictures are sampled."""
        asked, batch = self.rollout.overlap_rewards, self.rollout.batch
        if self.rollout.ahead:
            return False
        return asked is not False and batch is not None and batch < self.images_per_iteration

    @property
    def images_per_iteration(self) -> int:
        return self.group_size * self.groups_per_iteration

    @property
    def images_sampled(self) -> int:
        """Pictures that the model makes in an iteration; none where they were ranked before."""
        return 0 if self.data.preferences is not None else self.images_per_iteration
