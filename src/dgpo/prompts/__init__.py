"""Prompts are rows of text and metadata, read from files, lists and datasets."""

from dgpo.prompts.prompts import Prompt, PromptSampler, load_prompts, refuse_sizes

__all__ = ["Prompt", "PromptSampler", "load_prompts", "refuse_sizes"]
