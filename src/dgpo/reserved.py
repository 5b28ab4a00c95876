"""Arguments of a pipeline's call that dgpo sets itself, and the setting to use instead of each."""

from __future__ import annotations

_BY_STEP = "guidance that depends on a step's number cannot be trained with, point by point"
RESERVED = {
    "self": "it is the pipeline",
    "prompt": "use prompts.train",
    "prompt_2": "every encoder reads the same prompt",
    "prompt_3": "every encoder reads the same prompt",
    "prompt_embeds": "use prompts.train",
    "latents": "use seed",
    "generator": "use seed",
    "num_inference_steps": "use rollout.steps",
    "guidance_scale": "use rollout.guidance_scale",
    "true_cfg_scale": "use rollout.guidance_scale",
    "image": "give every prompt row 'image', a file",
    "mask_image": "give every prompt row 'mask', a file",
    "timesteps": "use rollout.scheduler and rollout.steps",
    "sigmas": "use rollout.scheduler and rollout.steps",
    "denoising_start": "a rollout starts from noise",
    "denoising_end": "a rollout ends with a clean sample",
    "skip_guidance_layers": _BY_STEP,
    "skip_layer_guidance_scale": _BY_STEP,
    "skip_layer_guidance_start": _BY_STEP,
    "skip_layer_guidance_stop": _BY_STEP,
    "num_images_per_prompt": "use group_size",
    "num_videos_per_prompt": "use group_size",
    "num_waveforms_per_prompt": "use group_size",
    "output_type": "dgpo sets it",
    "return_dict": "dgpo sets it",
    "callback": "dgpo listens to the scheduler instead",
    "callback_steps": "dgpo listens to the scheduler instead",
    "callback_on_step_end": "dgpo listens to the scheduler instead",
}
"""Argument to the way out. ``guidance_scale`` alone is free in some pipelines: where the denoiser
takes it as an input, it is no classifier-free guidance."""


def refusal(argument: str) -> str:
    """Return the message for a reserved argument in ``rollout.call``.

    >>> refusal("generator")
    'rollout.call.generator is not yours to set: use seed'
    """
    return f"rollout.call.{argument} is not yours to set: {RESERVED[argument]}"
