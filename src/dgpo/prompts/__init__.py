"""Prompts: rows of text and metadata, from files, lists and datasets."""

from dgpo.prompts.prompts import Prompt, PromptSampler, load_prompts, refuse_sizes

__all__ = ["Prompt", "PromptSampler", "load_prompts", "refuse_sizes"]
