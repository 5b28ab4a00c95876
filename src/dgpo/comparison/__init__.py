"""Recipes against each other: the same prompts, the same evaluation, the same machine."""
