"""Deterministic samplers by name, and what a diffusers scheduler says about its noise levels.

Nothing here integrates an ODE: the samplers are diffusers' own. This module chooses the class,
carries the settings of the pipeline's scheduler over to it (above all the shift of flow matching),
and reads the noise level of a step from the scheduler that made the step.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
import torch

from dgpo.core.process import Epsilon, FlowMatching, Level, Process, VPrediction
from dgpo.errors import UserError
from dgpo.registry import SAMPLERS, resolve
from dgpo.user_classes import make

_FLOW_SAMPLERS = {name: entry.flow for name, entry in SAMPLERS.items() if entry.flow}
_NOISE_SAMPLERS = {name: entry.path for name, entry in SAMPLERS.items()}
# settings that belong to the solver of the OLD scheduler; a new solver has its own
_SOLVER_SETTINGS = frozenset(
    {"algorithm_type", "solver_type", "solver_order", "solver_p", "disable_corrector", "predict_x0"}
)


def is_flow_matching(scheduler: Any) -> bool:
    """Return whether the scheduler integrates a velocity: ``x_s = (1 - s) x0 + s e``."""
    config = scheduler.config
    return (
        any(kind.__name__.startswith("FlowMatch") for kind in type(scheduler).__mro__)
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def is_continuous(scheduler: Any) -> bool:
    """Return whether the scheduler preconditions as EDM does (arXiv 2206.00364, sigma_data = 1).

    It holds ``x = x0 + sigma e`` and gives the denoiser ``x / sqrt(1 + sigma^2)``.
    """
    return hasattr(scheduler, "precondition_outputs") and scheduler.config.sigma_data == 1.0


def process_of(scheduler: Any) -> Process:
    """Return the noising process whose denoiser this scheduler integrates.

    Raises:
        UserError: the scheduler's prediction type is not velocity, epsilon or v.
    """
    if is_flow_matching(scheduler):
        return FlowMatching(inverted=bool(scheduler.config.get("invert_sigmas")))
    kind = scheduler.config.get("prediction_type")
    if is_continuous(scheduler) and kind == "v_prediction":
        return VPrediction(torch.empty(0))
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(alphas_cumprod, torch.Tensor):
        if kind == "epsilon":
            return Epsilon(alphas_cumprod)
        if kind == "v_prediction":
            return VPrediction(alphas_cumprod)
    raise UserError(
        f"cannot train with {type(scheduler).__name__} (prediction_type={kind!r}): its denoiser "
        "predicts neither a flow-matching velocity nor epsilon nor v"
    )


def level_of_last_step(scheduler: Any, timestep: Any) -> Level:
    """Return the noise level of the step that the scheduler has just taken.

    Returns:
        The timestep that the denoiser was given (0-dim), and its noise level: the sigma of flow
        matching as the scheduler counts it, or ``sqrt(1 - alphas_cumprod)`` for noise and v
        prediction. Both come from the scheduler's own tables, because UniPC and DPM-Solver round
        the timestep: it differs from 1000 sigma by up to one unit.
    """
    time = torch.as_tensor(timestep).detach().reshape(-1)[0].clone()
    index = getattr(scheduler, "step_index", None)
    # LCM and TCD count their steps, but have only a table of alphas
    if index is None or getattr(scheduler, "sigmas", None) is None:
        return Level(time, math.sqrt(1.0 - float(scheduler.alphas_cumprod[int(time)])))
    sigma = on_host(scheduler, "sigmas")[index - 1]
    if not is_flow_matching(scheduler):
        return Level(time, sigma / math.sqrt(1.0 + sigma * sigma))
    return Level(time, sigma)


def on_host(scheduler: Any, name: str) -> list[float]:
    """Return a table of a scheduler, such as ``sigmas``, as numbers.

    Some schedulers keep theirs on the device, where reading an entry at every step would wait for
    the step before. So the table is read when it is new.
    """
    table, kept = getattr(scheduler, name), f"_dgpo_{name}"
    known = getattr(scheduler, kept, None)
    if known is None or known[0] is not table:
        known = table, table.tolist()
        setattr(scheduler, kept, known)
    return known[1]


def sigmas_around(alphas_cumprod: torch.Tensor, timestep: float) -> tuple[float, float]:
    """Return the noise levels ``sqrt(1 - alphas_cumprod)`` one timestep below and one above.

    A sampler's level lies between them, although some samplers round the timestep, and others take
    one between two of the training schedule.
    """
    last = len(alphas_cumprod) - 1
    below, above = math.floor(timestep) - 1, math.ceil(timestep) + 1
    low, high = (
        math.sqrt(1.0 - float(alphas_cumprod[min(max(t, 0), last)])) for t in (below, above)
    )
    return low, high


def middle_timestep(scheduler: Any) -> torch.Tensor:
    """Return a timestep from the middle of the schedule, 0-dim."""
    schedule = scheduler.timesteps
    if schedule is None:  # PNDM has a schedule only once it has been run
        return torch.tensor(scheduler.config.num_train_timesteps // 2)
    return schedule[len(schedule) // 2]


def fresh(scheduler: Any) -> Any:
    """Return a copy that shares no state.

    Multi-step solvers keep past model outputs, and dynamic shifting writes into the config. A
    rollout with a copy of a scheduler that has never been run inherits neither.
    """
    return copy.deepcopy(scheduler)


def make_scheduler(name: str | None, base: Any) -> Any:
    """Return the deterministic sampler called ``name``, with the settings of the pipeline's
    scheduler.

    >>> from dgpo.models import load_pipeline
    >>> made = make_scheduler("dpmsolver++", load_pipeline("pocket").scheduler)
    >>> type(made).__name__, made.config.flow_shift
    ('DPMSolverMultistepScheduler', 1.5)

    Args:
        name: ``euler``, ``heun``, ``dpmsolver++`` or ``unipc`` for flow matching; ``ddim``,
            ``pndm`` (PLMS), ``dpmsolver++``, ``unipc``, ``deis``, ``euler`` or ``heun`` for noise
            and v prediction; ``package.module:Class`` or ``FILE.py:Class`` for a scheduler of the
            user's own; None for a fresh copy of ``base``.
        base: the scheduler of the pipeline. Its training schedule, prediction type and shift are
            kept.

    Raises:
        UserError: the name is unknown or does not fit the pipeline's prediction type, or the
            sampler cannot carry a setting of the pipeline's scheduler.
    """
    if name is None:
        if "old_pred_original_sample" in inspect.signature(base.step).parameters:
            raise UserError(
                f"rollout.scheduler: the pipeline's own {type(base).__name__} adds noise at every "
                "step and is not deterministic; use 'ddim'"
            )
        return fresh(base)
    if is_continuous(base):
        raise UserError(
            f"rollout.scheduler: {name!r} does not know the noise levels of "
            f"{type(base).__name__}; use null for the pipeline's own sampler"
        )
    flow = is_flow_matching(base)
    target = _sampler_class(name, base, flow)
    accepted = inspect.signature(target.__init__).parameters
    settings = _flow_settings(base, accepted) if flow else _noise_settings(name, base)
    if flow:
        _refuse_lost_settings(name, base.config, settings, accepted)
    settings = {key: value for key, value in settings.items() if key in accepted}
    made = make(target, settings, f"sampler {name!r}", f"rollout.scheduler: {name!r}")
    ours, theirs = type(process_of(made)).__name__, type(process_of(base)).__name__
    if ours != theirs:
        raise UserError(
            f"rollout.scheduler: {name!r} steps a denoiser of {ours}, and the pipeline's is one of "
            f"{theirs}; take prediction_type and the noise schedule as settings"
        )
    if not flow:
        _refuse_another_process(name, base, made)
    return made


def first_order_sampler(base: Any) -> Any:
    """Return a sampler whose every step follows the process from one level of its schedule to the
    next.

    It is Euler for flow matching, and DDIM for noise and v prediction.
    """
    if is_flow_matching(base):
        return make_scheduler("euler", base)
    if is_continuous(base):
        return type(base).from_config(base.config, solver_order=1)
    if _shifts_snr(base):
        return make_scheduler("ddim", base)  # CogVideoX's own, which keeps to its schedule
    return on_its_schedule(make_scheduler("ddim", base))


def on_its_schedule(scheduler: Any) -> Any:
    """Return the same sampler, whose first step goes to the second level of its schedule.

    With another spacing of timesteps DDIM and PLMS step to a level beside it.
    """
    if type(scheduler) not in (diffusers.DDIMScheduler, diffusers.PNDMScheduler):
        return scheduler
    return type(scheduler).from_config(scheduler.config, timestep_spacing="leading")


def begins_first_order(scheduler: Any) -> bool:
    """Return whether a rollout begins with a first-order step without noise.

    All samplers that can be named do; a pipeline's own may be of any kind.
    """
    config = scheduler.config
    named = {*_FLOW_SAMPLERS.values(), *_NOISE_SAMPLERS.values()}
    named.add("diffusers:CogVideoXDDIMScheduler")
    noisy = config.get("stochastic_sampling") or "sde" in (config.get("algorithm_type") or "")
    return f"diffusers:{type(scheduler).__name__}" in named and not noisy


def _refuse(name: str, flow: bool, fitting: list[str]) -> None:
    kind = "flow matching" if flow else "noise or v prediction"
    reason = f" ({SAMPLERS[name].unfit})" if name in SAMPLERS else ""
    message = f"rollout.scheduler: {name!r} does not fit a pipeline trained with {kind}{reason}"
    if name not in SAMPLERS:
        message = f"rollout.scheduler: there is no sampler {name!r}"
        nearest = difflib.get_close_matches(name.lower(), fitting, n=1, cutoff=0.4)
        message += f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise UserError(
        f"{message}; these fit: {', '.join(fitting)}, or null for the pipeline's own, or a "
        "scheduler of yours as FILE.py:Class"
    )


def _shifts_snr(base: Any) -> bool:
    return base.config.get("snr_shift_scale", 1.0) != 1.0


def _own_settings(base: Any) -> dict[str, Any]:
    """Return the settings of a scheduler that a new solver can take over."""
    own = {k: v for k, v in base.config.items() if not k.startswith("_")}
    return {k: v for k, v in own.items() if k not in _SOLVER_SETTINGS}


def _flow_settings(base: Any, accepted: Mapping[str, Any]) -> dict[str, Any]:
    settings = _own_settings(base)
    # one number has two names: FlowMatch* calls it shift, the multi-step solvers flow_shift
    shift = settings.get("flow_shift", settings.get("shift", 1.0))
    settings.update(shift=shift, flow_shift=shift)
    if "use_flow_sigmas" in accepted:  # a solver of several processes
        settings.update(prediction_type="flow_prediction", use_flow_sigmas=True)
        settings.update(final_sigmas_type="zero", lower_order_final=True)
    return settings


def _sampler_class(name: str, base: Any, flow: bool) -> Any:
    """Return the class behind a name; CogVideoX, whose SNR is shifted, has a DDIM of its own."""
    if ":" in name:
        found = resolve("sampler", name)
        if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
            raise UserError(
                f"rollout.scheduler: {name!r} is {found!r:.80}, no scheduler class: derive one of "
                "diffusers.SchedulerMixin and ConfigMixin, or of a scheduler of diffusers"
            )
        return found
    fitting = _FLOW_SAMPLERS if flow else _NOISE_SAMPLERS
    if name not in fitting:
        _refuse(name, flow, list(fitting))
    if flow or not _shifts_snr(base):
        return resolve("sampler", fitting[name])
    if name != "ddim":
        raise UserError(
            f"rollout.scheduler: {name!r} cannot carry snr_shift_scale of "
            f"{type(base).__name__}; use 'ddim'"
        )
    return diffusers.CogVideoXDDIMScheduler


def _refuse_another_process(name: str, base: Any, made: Any) -> None:
    """Refuse a sampler that has other noise levels, or that no longer clips.

    Raises:
        UserError: with the setting of the pipeline's scheduler that is lost.
    """
    lost = [
        key
        for key in ("clip_sample", "thresholding")
        if base.config.get(key) and key not in made.config
    ]
    ours, theirs = (one.alphas_cumprod.double() for one in (made, base))
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
        lost.append("snr_shift_scale" if _shifts_snr(base) else "rescale_betas_zero_snr")
    if lost:
        raise UserError(
            f"rollout.scheduler: {name!r} cannot carry {lost[0]}={base.config.get(lost[0])} of the "
            "pipeline's scheduler; use 'ddim', or null for the pipeline's own sampler"
        )


def _noise_settings(name: str, base: Any) -> dict[str, Any]:
    settings = _own_settings(base)
    # clipping x0 suits pixels; in latent space it would cut the picture
    settings.setdefault("clip_sample", False)
    if name == "ddim":
        settings.setdefault("set_alpha_to_one", False)
    if name == "pndm":
        settings["skip_prk_steps"] = True
    return settings


def _refuse_lost_settings(name: str, config: Any, settings: dict[str, Any], accepted: Any) -> None:
    """Refuse a sampler that cannot follow the schedule of the pipeline's scheduler."""
    neutral = {"use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None}
    for key, value in neutral.items():
        if settings.get(key, value) not in (value, 0) and key not in accepted:
            raise UserError(
                f"rollout.scheduler: {name!r} cannot carry {key}={settings[key]} of the "
                "pipeline's scheduler; use 'euler', or null for the pipeline's own sampler"
            )
    linear = config.get("time_shift_type", "exponential") == "linear"
    if name == "dpmsolver++" and linear and config.get("use_dynamic_shifting"):
        raise UserError("rollout.scheduler: 'dpmsolver++' cannot shift time linearly; use 'euler'")
