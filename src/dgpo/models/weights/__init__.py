"""Weights: LoRA, snapshots, what is restored after a pass, and what saves memory."""
