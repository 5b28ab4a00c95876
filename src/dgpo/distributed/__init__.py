"""Several processes, started by ``torchrun`` or ``accelerate launch``, train as one.

Every process makes and trains its share of the pictures. Prompts, noise, noise levels and
advantages are those of the whole iteration, so the number of processes changes no result.
"""

from dgpo.distributed.processes import SINGLE, Processes, current_processes

__all__ = ["SINGLE", "Processes", "current_processes"]
