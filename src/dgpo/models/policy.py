"""The policy: a pipeline, the weights that are trained, and the weights it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dgpo.core.process import Level
from dgpo.distributed.sharding import any_sharded, plain_class, whole
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.weights import lora as lora_weights
from dgpo.models.weights.lora import LoraSettings
from dgpo.models.weights.snapshots import Snapshot, exchanged

Weights = Literal["policy", "old", "ref"]
RollingWeights = Literal["policy", "old", "slow"]


class Policy:
    """A pipeline of which a LoRA, or the whole denoiser, is trained.

    The reference is the model as it was: the LoRA switched off, or a frozen copy of the denoiser.
    ``old`` and ``slow`` are moving averages: the algorithm says when ``old`` moves and how far
    (policy gradients have none), the recipe's ``ema`` when ``slow`` does.

    Args:
        model: the pipeline. All its modules are frozen and put into evaluation mode; only what
            :meth:`parameters` returns is trained.
        lora: rank, alpha, targets and initialisation; None to train the denoiser itself.
        seed: of the LoRA's initialisation. The global random state is left alone.
        snapshot_device: where the copies live; None for beside the weights.

    Raises:
        UserError: a LoRA target that is no linear or convolution layer of the denoiser, a denoiser
            that carries a LoRA already, or full fine-tuning in half precision.
    """

    def __init__(
        self,
        model: PipelineModel,
        lora: LoraSettings | None,
        seed: int = 0,
        *,
        snapshot_device: torch.device | str | None = None,
    ) -> None:
        lora_weights.refuse_adapted(model.denoisers)
        self.model = model
        self.lora = lora
        for module in model.pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        if lora is not None:
            self._layers = lora_weights.attach(model.denoisers, lora, seed)
        else:
            self._layers = []
            _unfreeze(model.denoisers)
        self._named = {
            f"{name}.{parameter_name}": parameter
            for name, denoiser in model.denoisers.items()
            for parameter_name, parameter in denoiser.named_parameters()
            if parameter.requires_grad
        }
        trained = self.parameters()
        self.old = Snapshot(trained, snapshot_device)
        self.slow = Snapshot(trained, snapshot_device)
        self._frozen = Snapshot(trained, snapshot_device) if lora is None else None

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in a stable order; always float32 or wider."""
        return list(self._named.values())

    @property
    def _blends(self) -> bool:
        """Whether the policy's pass may run on merged weights: checkpointed blocks run again at
        backward, when the weights are apart."""
        again = (
            getattr(d, "is_gradient_checkpointing", False) for d in self.model.denoisers.values()
        )
        return lora_weights.can_merge(self._layers) and not any(again)

    def predict(
        self,
        xt: Tensor,
        level: Level,
        cond: Conditioning,
        weights: Weights = "policy",
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """:meth:`PipelineModel.predict` under the policy's, the old or the reference weights.

        Gradients for ``policy`` alone; ``old`` and ``ref`` are evaluated without.
        """
        if weights == "policy":
            with lora_weights.blended(self._layers) if self._blends else nullcontext():
                return self.model.predict(xt, level, cond, guidance_scale)
        if weights == "ref":
            place = self.reference()
        elif weights == "old":
            place = self._placed(self.old)
        else:
            raise ValueError(f"weights must be 'policy', 'old' or 'ref', got {weights!r}")
        with torch.no_grad(), place:
            return self.model.predict(xt, level, cond, guidance_scale)

    @contextmanager
    def rolling(self, weights: RollingWeights = "policy") -> Iterator[None]:
        """Put weights in place for rollouts; everything is back, bit for bit, after the block.

        A LoRA is merged into the base weights meanwhile, ``W + scale B A``, so that it costs
        nothing. In half precision it is not: rounding the sum would lose small updates, and the
        pictures would come from another model than the one that is trained. Nor is it where the
        base weights are sharded.
        """
        snapshots = {"policy": None, "old": self.old, "slow": self.slow}
        if weights not in snapshots:
            raise ValueError(f"weights must be 'policy', 'old' or 'slow', got {weights!r}")
        with self._placed(snapshots[weights]):
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model as it was before training, for the time of the block."""
        if self._frozen is not None:
            with self._frozen.swapped():
                yield
        else:
            with lora_weights.disabled(self._layers):
                yield

    @contextmanager
    def _placed(self, snapshot: Snapshot | None) -> Iterator[None]:
        """A snapshot's weights (None: the policy's own), merged where that is exact enough."""
        with nullcontext() if snapshot is None else snapshot.swapped():
            if not lora_weights.can_merge(self._layers):
                yield
                return
            bases, values = lora_weights.merged(self._layers)
            with exchanged(bases, values), lora_weights.disabled(self._layers):
                yield

    @property
    def sharded(self) -> bool:
        """Whether the weights of the denoiser are spread over processes, all of which must then
        make the same passes."""
        return any_sharded(self.model.denoisers.values())

    def save(
        self, directory: str | Path, weights: RollingWeights = "slow", writes: bool = True
    ) -> None:
        """Write the trained weights as diffusers reads them. Collective if they are sharded, when
        one process alone ``writes``.

        A LoRA is read by ``pipe.load_lora_weights(directory)``, its alpha included (that of a
        second expert, ``transformer_2``, lies in a folder of that name and is read with
        ``load_into_transformer_2=True``). A fully trained denoiser is written to
        ``directory/transformer`` (or ``unet``) and read by the ``from_pretrained`` of its class.
        """
        snapshots = {"policy": None, "old": self.old, "slow": self.slow}
        if weights not in snapshots:
            raise ValueError(f"weights must be 'policy', 'old' or 'slow', got {weights!r}")
        snapshot = snapshots[weights]
        folder = Path(directory)
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        with nullcontext() if snapshot is None else snapshot.swapped():
            if self.lora is not None:
                if writes:
                    lora_weights.save(self.model.pipe, self.model.denoisers, folder)
                return
            for name, denoiser in self.model.denoisers.items():
                complete = _complete(denoiser, writes)
                if writes:
                    complete.save_pretrained(folder / name)

    def state_dict(self) -> dict[str, Tensor]:
        """Trained weights and moving averages as flat tensors, sharded if the weights are."""
        state = {f"policy.{name}": p.detach() for name, p in self._named.items()}
        for kind, snapshot in (("old", self.old), ("slow", self.slow)):
            for name, tensor in zip(self._named, snapshot.tensors, strict=True):
                state[f"{kind}.{name}"] = tensor
        return state

    def refuse_other(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See that a state's names and shapes are those of this policy.

        Raises:
            UserError: they are not.
        """
        own = self.state_dict()
        wrong = sorted(set(own) ^ set(shapes))
        wrong += [n for n in own if n in shapes and tuple(own[n].shape) != shapes[n]]
        if wrong:
            raise UserError(
                f"the checkpoint does not fit this policy ({len(wrong)} weights differ, first "
                f"{wrong[0]!r}): were model and lora of the recipe changed?"
            )


def _complete(denoiser: nn.Module, wanted: bool) -> Any:
    """A denoiser with all its weights: itself, or one that is made of the pieces. Collective if it
    is sharded; where it is not ``wanted``, it is not made."""
    kind = plain_class(denoiser)
    if kind is type(denoiser):
        return denoiser
    state: dict[str, Tensor] = {}
    for name, tensor in denoiser.state_dict().items():
        gathered = whole(tensor)
        if wanted:
            state[name] = gathered.cpu()
    if not wanted:
        return None
    with torch.device("meta"):
        made = kind.from_config(denoiser.config)
    made.load_state_dict(state, assign=True)
    return made


def _unfreeze(denoisers: Mapping[str, nn.Module]) -> None:
    for name, denoiser in denoisers.items():
        narrow = {p.dtype for p in denoiser.parameters() if p.dtype.itemsize < 4}
        if narrow:
            raise UserError(
                f"lora: null trains all of {name}, whose weights are {narrow.pop()}: steps smaller "
                "than its rounding would be lost. Use precision: float32, or a LoRA"
            )
        denoiser.requires_grad_(True)


__all__ = ["LoraSettings", "Policy", "RollingWeights", "Weights"]
