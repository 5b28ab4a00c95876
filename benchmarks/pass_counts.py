"""Kernels and bytes of the passes of Stable Diffusion 3.5 Medium, counted; host time of the LoRA.

    python benchmarks/pass_counts.py [--rows 8] [--precision bfloat16] [--side 64] [--host]

The network has the real shape and no numbers: it lies on torch's meta device, where each operation
is counted as one kernel. Views and allocations are none. Attention is one kernel, as the fused ones
are. Bytes are those that kernels other than matrix products and attention read and write; they
bound the time of such kernels. All figures are exact, and the same on every machine.

``--host`` measures what the LoRA costs the host besides, in microseconds of CPU time: putting the
weights of a pass in place, for each of policy, old and reference, with real (small) tensors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import process_time
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dgpo.models.policy import Policy
from dgpo.recipe.sections import LoraSettings

SD35M: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
TOKENS = 333
_NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach"}
_NO_KERNEL |= {"_unsafe_view", "_reshape_alias"}


@dataclass(frozen=True)
class Kernel:
    """A ``Kernel`` is one operation that was counted: its name, its FLOPs and its bytes."""

    name: str
    flops: int
    size: int


class Count(TorchDispatchMode):
    """A ``Count`` notes every kernel inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if is_view or name in _NO_KERNEL:
            return made
        read = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        written = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        size = sum(map(_bytes, [*read.values(), *written]))
        if name == "addmm_":  # the sum is written in place
            flops = 2 * args[1].numel() * args[2].shape[-1]
        else:
            count = flop_registry.get(func.overloadpacket)
            flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=made)
        self.kernels.append(Kernel(name, flops, size))
        return made

    def row(self, per: int) -> dict[str, float]:
        """Return the counts, FLOPs and bytes for each of ``per`` pictures."""
        other = [k for k in self.kernels if not k.flops]
        return {
            "kernels": len(self.kernels),
            "products": len(self.kernels) - len(other),
            "TFLOP": round(sum(k.flops for k in self.kernels) / per / 1e12, 3),
            "GB of products": round(sum(k.size for k in self.kernels if k.flops) / per / 1e9, 2),
            "GB": round(sum(k.size for k in other) / per / 1e9, 2),
        }


def _bytes(tensor: Tensor) -> int:
    # an expanded tensor is no larger than its storage
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class _Attention(torch.autograd.Function):
    """Attention as one kernel, of which the backward pass makes five products instead of two."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, count: Count) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.count = count
        count.kernels.append(Kernel("attention", _attention_flops(query, key, 2), 0))
        return query.new_empty(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        ctx.count.kernels.append(Kernel("attention", _attention_flops(query, key, 5), 0))
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention_flops(query: Tensor, key: Tensor, products: int) -> int:
    return 2 * products * query.numel() * key.shape[-2]


def counted(call: Callable[[], Any]) -> tuple[Count, Any]:
    """Return the count of a call, and what the call returns."""
    own, count = torch.nn.functional.scaled_dot_product_attention, Count()

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _Attention.apply(query, key, value, count)

    torch.nn.functional.scaled_dot_product_attention = attention  # pyright: ignore
    try:
        with count:
            return count, call()
    finally:
        torch.nn.functional.scaled_dot_product_attention = own  # pyright: ignore


def policy_of(denoiser: Any, inputs: dict[str, Any], rank: int) -> Policy:
    """Return a policy whose prediction is one call of the denoiser, and nothing else."""

    def predict(*_: Any) -> Tensor:
        return denoiser(**inputs, return_dict=False)[0]

    pipe = SimpleNamespace(components={"transformer": denoiser})
    model: Any = SimpleNamespace(pipe=pipe, denoisers={"transformer": denoiser}, predict=predict)
    return Policy(model, LoraSettings(rank=rank, alpha=2 * rank), 0)


def network(
    device: str, dtype: torch.dtype, rows: int, side: int, rank: int = 64, **smaller: Any
) -> Policy:
    """Return the policy of a network of SD3.5 Medium's shape, or of a smaller one.

    Args:
        device: where it lies.
        dtype: its precision.
        rows: how many samples a pass has.
        side: of the latents, in their pixels: an eighth of the picture's.
        rank: of the LoRA.
        smaller: what is changed of the shape.
    """
    shape = SD35M | smaller
    with torch.device(device):
        denoiser: Any = SD3Transformer2DModel(**shape)
        denoiser.to(dtype)
        inputs = {
            "hidden_states": torch.zeros(rows, shape["in_channels"], side, side, dtype=dtype),
            "timestep": torch.zeros(rows),
            "encoder_hidden_states": torch.zeros(
                rows, TOKENS, shape["joint_attention_dim"], dtype=dtype
            ),
            "pooled_projections": torch.zeros(rows, shape["pooled_projection_dim"], dtype=dtype),
        }
    return policy_of(denoiser, inputs, rank)


def show_counts(rows: int, side: int, dtype: torch.dtype) -> None:
    policy, none = network("meta", dtype, rows, side), SimpleNamespace()
    for weights in ("ref", "old", "policy"):
        count, made = counted(lambda w=weights: policy.predict(none, none, none, w))  # type: ignore
        print(json.dumps({"pass": weights, **count.row(rows)}), flush=True)
    loss = made.float().square().mean()
    count, _ = counted(loss.backward)
    print(json.dumps({"pass": "backward", **count.row(rows)}), flush=True)


def show_host() -> None:
    """Print the host's time for a pass with each kind of weights, less that of the denoiser."""
    small = {"num_attention_heads": 1, "caption_projection_dim": 64, "sample_size": 4}
    small |= {"joint_attention_dim": 8, "pooled_projection_dim": 8, "pos_embed_max_size": 4}
    policy, none = network("cpu", torch.bfloat16, 1, 4, rank=1, **small), SimpleNamespace()
    policy.model.predict = lambda *_: torch.zeros(())  # type: ignore
    for weights in ("ref", "old", "policy"):
        spent = []
        for _ in range(50):
            began = process_time()
            policy.predict(none, none, none, weights)  # type: ignore
            spent.append(process_time() - began)
        found = round(1e6 * median(spent))
        print(json.dumps({"weights put in place": weights, "microseconds": found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--host", action="store_true", help="the host's time alone")
    given = parser.parse_args()
    if given.host:
        torch.set_num_threads(1)
        show_host()
    else:
        show_counts(given.rows, given.side, getattr(torch, given.precision))


if __name__ == "__main__":
    main()
