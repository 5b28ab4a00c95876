"""Samplers: deterministic schedulers by name, and stochastic ones for policy gradients."""
