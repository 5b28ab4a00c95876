"""The rewards that a recipe may name, one file each."""
