"""The loop: collect groups, rank them, learn from the ranking; evaluate, save, go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any


from dgpo.algorithms.base import Algorithm
from dgpo.checkpoint import load_checkpoint, save_checkpoint
from dgpo.collection import collect
from dgpo.errors import UserError
from dgpo.evaluation import Report, Sampling, evaluate, sample_images
from dgpo.models.load import load_pipeline
from dgpo.models.pipeline import PipelineModel
from dgpo.models.policy import Policy, RollingWeights
from dgpo.models.schedulers import make_scheduler
from dgpo.progress import Progress, clock
from dgpo.prompts import Prompt, PromptSampler, load_prompts
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet, load_rewards
from dgpo.tracking import Tracker, refuse_existing_run
from dgpo.updating import Updater


class Trainer:
    """Post-trains a diffusion or flow model with a reward.

    Args:
        model: a diffusers pipeline, or what a recipe's ``model`` may be; None for the recipe's.
        reward_funcs: functions ``(images, prompts, **metadata columns) -> list[float]`` or names,
            one or several, or ``{name: weight}``; None for the recipe's.
        train_dataset: prompts: texts, rows with ``prompt`` and metadata, a ``datasets.Dataset``, a
            file, or a set's name; None for the recipe's.
        eval_dataset: held-out prompts, likewise.
        algorithm: e.g. ``DGPO(beta=100)``; None for the recipe's.
        recipe: every other setting: a :class:`Recipe`, its name or file, or nested dicts.
        resume: go on from the last checkpoint in the recipe's run folder.

    Raises:
        UserError: anything that would fail later, before compute is spent.
    """

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        algorithm: Algorithm | None = None,
        recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        self.recipe = _recipe(recipe, model, algorithm)
        if not resume:
            refuse_existing_run(self.recipe.run.dir)
        self.algorithm = self.recipe.algorithm
        rewards = self.recipe.rewards if reward_funcs is None else reward_funcs
        self.rewards: RewardSet = load_rewards(rewards)
        source = self.recipe.prompts.train if train_dataset is None else train_dataset
        self.prompts = load_prompts(source)
        held_out = self.recipe.prompts.eval if eval_dataset is None else eval_dataset
        self.eval_prompts = [] if held_out is None else load_prompts(held_out)
        self.eval_prompts = self.eval_prompts[: self.recipe.eval.limit]
        self.metrics: Sequence[str | Callable] = self.recipe.eval.metrics or _first_to_last(rewards)
        self.rewards.check([*self.prompts, *self.eval_prompts])
        self.sampler = PromptSampler(
            self.prompts, self.recipe.groups_per_iteration, self.recipe.seed
        )
        pipe = model if _is_pipeline(model) else None
        if pipe is None:
            pipe = load_pipeline(self.recipe.model, self.recipe.precision)
        self.model = PipelineModel(pipe, call=self.recipe.rollout.call)
        self.scheduler = make_scheduler(self.recipe.rollout.scheduler, pipe.scheduler)
        self.model.self_check(self.model.encode([p.text for p in self.prompts[:2]], guidance=True))
        self.policy = Policy(self.model, self.recipe.lora, self.recipe.seed)
        self.updater = Updater(self.policy, self.algorithm, self.recipe)
        self.folder = Path(self.recipe.run.dir)
        self.iteration = 0
        """Iterations done."""
        self.seconds = 0.0
        """Training time spent: rollouts, rewards and updates; evaluation does not count."""
        self.last_report: Report | None = None
        self._resume = resume
        if resume:
            counters = load_checkpoint(self._checkpoint, self.policy, self.updater)
            self.iteration, self.seconds = counters["iteration"], counters["seconds"]

    def train(self) -> Report | None:
        """Run to the recipe's end; returns the last evaluation's report, if there is one.

        Ctrl-C saves a checkpoint and leaves with ``KeyboardInterrupt``; ``resume=True`` (or
        ``dgpo train RECIPE --resume``) goes on from it.
        """
        recipe, first = self.recipe, self.iteration
        tracker = Tracker(recipe, resume_after=first if self._resume else None)
        progress = Progress(recipe.train.iterations, recipe.train.max_minutes)
        with tracker, progress:
            self._tracker, self._progress = tracker, progress
            try:
                if first == 0:
                    self._start()
                while not self._finished:
                    row = self._iterate()
                    tracker.log(row)
                    progress.iteration(
                        self.iteration,
                        reward=row["reward_mean"],
                        spread=1 - row["groups_dropped"] / recipe.groups_per_iteration,
                        clipped=row.get("clipped", 0.0),
                        samples_per_second=recipe.images_per_iteration / row["seconds_iteration"],
                        trained_seconds=self.seconds,
                        first=first,
                    )
                    self._when_due()
            except KeyboardInterrupt:
                progress.say(f"stopped after iteration {self.iteration}; saving")
                self._save_checkpoint()
                tracker.summarize()
                raise
            self._end()
        return self.last_report

    def evaluate(self, weights: RollingWeights = "slow") -> Report:
        """Score the held-out prompts with the slow average of the weights (or others).

        Raises:
            UserError: there are no held-out prompts.
        """
        if not self.eval_prompts:
            raise UserError("no held-out prompts: set prompts.eval, or give eval_dataset")
        with self.policy.rolling(weights):
            report, _ = evaluate(
                self.model,
                self.eval_prompts,
                self.metrics,
                self._sampling,
                name=str(self.recipe.prompts.eval or "eval_dataset"),
            )
        self.last_report = report
        return report

    def save_model(self, directory: str | Path) -> None:
        """Write the slow average of the trained weights as diffusers reads them."""
        self.policy.save(directory, "slow")

    def _iterate(self) -> dict[str, Any]:
        """One iteration: collect, update, count.  Returns its row of ``metrics.jsonl``."""
        began = monotonic()
        number = self.iteration
        self._progress.stage("rollout")
        collected = collect(
            self.policy,
            self.rewards,
            self.algorithm,
            self.sampler.at(number),
            self.recipe,
            number,
            self.scheduler,
        )
        self._progress.stage("training")
        update_began = monotonic()
        figures: dict[str, float] = {"loss": 0.0}
        if collected.batch is not None:
            figures = self.updater.update(collected.batch, number)
        ended = monotonic()
        self.iteration += 1
        self.seconds += ended - began
        return {
            "iteration": self.iteration,
            **collected.figures,
            **figures,
            "seconds": self.seconds,
            "seconds_iteration": ended - began,
            "seconds_rollout": collected.seconds["rollout"],
            "seconds_reward": collected.seconds["reward"],
            "seconds_train": ended - update_began,
        }

    @property
    def _finished(self) -> bool:
        limit = self.recipe.train.max_minutes
        late = limit is not None and self.seconds >= 60 * limit
        return late or self.iteration >= self.recipe.train.iterations

    def _start(self) -> None:
        """Before the first update: the base model's pictures and score."""
        self._before = self._draw("before")
        if self.recipe.eval.at_start and self.eval_prompts:
            self._evaluate()

    def _when_due(self) -> None:
        """Evaluate, draw and save after an iteration, as often as the recipe says."""
        recipe, done = self.recipe, self.iteration
        if self._finished:
            return  # the end does all three
        if recipe.eval.every and done % recipe.eval.every == 0 and self.eval_prompts:
            self._evaluate()
        every = recipe.eval.every if recipe.samples.every is None else recipe.samples.every
        if every and done % every == 0:
            self._draw(f"{done:06d}")
        if recipe.checkpoint.every and done % recipe.checkpoint.every == 0:
            self._save_checkpoint()

    def _end(self) -> None:
        if self.eval_prompts:
            self._evaluate()
        after = self._draw("after")
        if after is not None:
            before = getattr(self, "_before", None) or self._pictures(base=True)
            self._tracker.compare(before, after, [p.text for p in self._shown])
        self._save_checkpoint()
        self._tracker.summarize()
        self._progress.say(
            f"{self.iteration} iterations in {clock(self.seconds)}; results in {self.folder}"
        )

    def _evaluate(self) -> None:
        self._progress.stage("evaluating")
        report = self.evaluate()
        self._tracker.evaluation(self.iteration, self.seconds, report)
        low, high = report.ci95
        score = f"{report.overall:.3f} [{low:.3f}, {high:.3f}]"
        self._progress.say(f"iteration {self.iteration}: held-out {self._first_metric} {score}")

    @property
    def _first_metric(self) -> str:
        first = self.metrics[0]
        return first if isinstance(first, str) else getattr(first, "__name__", "score")

    @property
    def _shown(self) -> list[Prompt]:
        """The prompts of the grids: evenly from the held-out rows, or from the training rows."""
        rows = self.eval_prompts or self.prompts
        count = min(self.recipe.samples.count, len(rows))
        return [rows[i * len(rows) // count] for i in range(count)]

    def _draw(self, name: str) -> list | None:
        if not self.recipe.samples.count:
            return None
        images = self._pictures()
        self._tracker.grid(name, images, [p.text for p in self._shown])
        return images

    def _pictures(self, base: bool = False) -> list:
        place = self.policy.reference() if base else self.policy.rolling("slow")
        with place:
            return sample_images(self.model, self._shown, self._sampling, self.recipe.seed)

    @property
    def _sampling(self) -> Sampling:
        rollout, own = self.recipe.rollout, self.recipe.eval
        guidance = rollout.guidance_scale if own.guidance_scale is None else own.guidance_scale
        return Sampling(own.steps or rollout.steps, guidance, self.scheduler, own.batch)

    @property
    def _checkpoint(self) -> Path:
        return Path(self.recipe.run.dir) / "checkpoints" / "last"

    def _save_checkpoint(self) -> None:
        self._progress.stage("saving")
        counters = {"iteration": self.iteration, "seconds": self.seconds}
        save_checkpoint(self._checkpoint, self.policy, self.updater, counters)
        if self.recipe.lora is None:
            self.save_model(self.folder / "model")
        else:
            self.save_model(self.folder / "lora")


def _recipe(recipe: Any, model: Any, algorithm: Algorithm | None) -> Recipe:
    """The recipe with what was given beside it put in, validated as a whole."""
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.load(recipe)
    elif isinstance(recipe, Mapping):
        recipe = Recipe.from_dict(recipe)
    recipe = recipe or Recipe()
    data: dict[str, Any] = {}
    if isinstance(model, (str, Path)):
        data["model"] = str(model)
    elif _is_pipeline(model):
        data["model"] = getattr(model.config, "_name_or_path", None) or type(model).__name__
    if algorithm is not None:
        data["algorithm"] = algorithm
    return Recipe.from_dict({**recipe.to_dict(), **data}) if data else recipe


def _is_pipeline(model: Any) -> bool:
    return model is not None and not isinstance(model, (str, Path))


def _first_to_last(rewards: Any) -> list[str | Callable]:
    if isinstance(rewards, Mapping):
        return list(rewards)
    if isinstance(rewards, str) or callable(rewards):
        return [rewards]
    return list(rewards)



