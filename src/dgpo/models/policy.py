"""The policy: a pipeline, the weights that are trained, and the weights it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dgpo.core.process import Level
from dgpo.distributed.sharding import let_go, plain_class, whole
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.weights import lora as lora_weights
from dgpo.models.weights import lora_files
from dgpo.models.weights.compute import is_compiled
from dgpo.models.weights.lora import LoraSettings
from dgpo.models.weights.lora_passes import LoraPasses
from dgpo.models.weights.masters import Masters
from dgpo.models.weights.snapshots import Snapshot, exchanged

Weights = Literal["policy", "old", "ref"]
RollingWeights = Literal["policy", "old", "slow"]


class Policy:
    """A ``Policy`` is a pipeline of which a LoRA, or the whole denoiser, is trained.

    The reference is the model as it was before training: the LoRA switched off, or a frozen copy of
    the denoiser. ``old`` and ``slow`` are moving averages: the algorithm says when ``old`` moves
    and how far (policy gradients have none), the recipe's ``ema`` when ``slow`` does.

    Args:
        model: the pipeline. All its modules are frozen and put into evaluation mode; only what
            :meth:`parameters` returns is trained.
        lora: rank, alpha, targets and initialisation; None to train the denoiser itself.
        seed: seeds the LoRA's initialisation. The global random state is left alone.
        snapshot_device: where the copies live; None for beside the weights.

    Raises:
        UserError: a LoRA target that is no linear or convolution layer of the denoiser, a denoiser
            that carries a LoRA already, or full fine-tuning of weights in 8 bits.
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
        let_go(model.denoisers.values())  # whether weights can be merged is asked of the pieces
        self.model = model
        self.lora = lora
        # in evaluation mode: with dropout a training pass would not answer as the rollout did
        for module in model.pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        self.targets: list[str] = []
        """How the names of the layers with a LoRA end."""
        layers: list[Any] = []
        if lora is None:
            _unfreeze(model.denoisers)
        else:
            self.targets = lora_weights.resolve_targets(model.denoisers, lora.targets)
            layers = lora_weights.attach(model.denoisers, lora, self.targets, seed)
        self.passes = LoraPasses(layers, is_compiled(model.denoisers))
        """How the LoRA takes part in each pass."""
        self._checkpoints = [
            module
            for denoiser in model.denoisers.values()
            for module in denoiser.modules()
            if hasattr(module, "gradient_checkpointing")
        ]
        weights = {
            f"{name}.{parameter_name}": parameter
            for name, denoiser in model.denoisers.items()
            for parameter_name, parameter in denoiser.named_parameters()
            if parameter.requires_grad
        }
        self.masters = Masters([*weights.values()])
        """What is trained, and what passes compute with."""
        self._named = dict(zip(weights, self.masters.parameters, strict=True))
        trained, held = self.parameters(), self.masters.weights
        assert lora is None or [*map(id, trained)] == [*map(id, self.passes.weights)]
        self.old = Snapshot(trained, snapshot_device, held)
        self.slow = Snapshot(trained, snapshot_device, held)
        self._frozen = Snapshot(held, snapshot_device) if lora is None else None

    @property
    def news(self) -> list[str]:
        """Return what a run says when it starts: the layers that ``lora.targets: auto`` found."""
        if self.lora is None or self.lora.targets != "auto":
            return []
        found = f"a LoRA on {len(self.passes.layers)} layers: {', '.join(self.targets)}"
        return [f"{found} (lora.targets: auto)"]

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained, in a stable order; always float32 or wider. Where all of a
        denoiser in half precision is trained, these are its masters."""
        return list(self._named.values())

    @property
    def _runs_again(self) -> bool:
        """Return whether blocks run again at backward (gradient checkpointing), when the weights
        that were put in place for a pass are gone."""
        return any(module.gradient_checkpointing for module in self._checkpoints)

    def predict(
        self,
        xt: Tensor,
        level: Level,
        cond: Conditioning,
        weights: Weights = "policy",
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Call :meth:`PipelineModel.predict` with the policy's, the old or the reference weights.

        Only ``policy`` is evaluated with gradients.

        Raises:
            ValueError: there are no weights of that name.
        """
        if weights == "policy":
            with self._trained():
                return self.model.predict(xt, level, cond, guidance_scale)
        if weights == "ref":
            place = self.reference()
        elif weights == "old":
            place = self._placed(self.old)
        else:
            raise ValueError(f"weights must be 'policy', 'old' or 'ref', got {weights!r}")
        # a graph of the policy's pass keeps its own tensors, as storage is exchanged
        with torch.no_grad(), place:
            return self.model.predict(xt, level, cond, guidance_scale)

    @contextmanager
    def rolling(self, weights: RollingWeights = "policy", *, merge: bool = False) -> Iterator[None]:
        """Put weights in place for rollouts; everything is back, bit for bit, after the block.

        Inside the block a LoRA is merged into the base weights, ``W + scale B A``, so that it costs
        nothing. It is not merged in half precision: rounding the sum would lose small updates, and
        the pictures would come from another model than the one that is trained. There it is
        computed as in training (:mod:`dgpo.models.weights.lora_passes`). Nor is it merged into base
        weights that are sharded.

        Args:
            weights: whose.
            merge: merge in half precision, too (:mod:`dgpo.models.accelerate`).

        Raises:
            ValueError: there are no weights of that name.
        """
        with self._placed(self._snapshot(weights), merge):
            yield
        let_go(self.model.denoisers.values())

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block the model is as it was before training."""
        if self._frozen is not None:
            with self._frozen.swapped():
                yield
        else:
            with self.passes.reference():
                yield

    def _trained(self) -> AbstractContextManager[None]:
        """Return a block in which the policy's own weights are in place, with gradients if these
        are on."""
        if self._runs_again:
            self.masters.write()
            return nullcontext()
        if torch.is_grad_enabled():
            if self.passes.narrow is not None:
                return self.passes.cast(self.passes.weights, gradients=True)
            if self.passes.merges:
                return self.passes.blended()
        return self._placed(None)

    @contextmanager
    def _placed(self, snapshot: Snapshot | None, merge: bool = False) -> Iterator[None]:
        """Inside the block a snapshot's weights (None: the policy's own) are in place, merged where
        that is exact enough, or where it is asked for."""
        passes = self.passes
        merge = passes.merges or (merge and bool(passes.layers))
        if passes.narrow is not None and not merge:
            with passes.cast(passes.weights if snapshot is None else snapshot.tensors):
                yield
            return
        if snapshot is None:
            self.masters.write()
        with nullcontext() if snapshot is None else snapshot.swapped():
            if not merge:
                yield
                return
            # after the exchange: what is merged is the LoRA of the snapshot
            bases, values = passes.merged()
            with exchanged(bases, values), passes.off():
                yield

    def _snapshot(self, weights: RollingWeights) -> Snapshot | None:
        snapshots = {"policy": None, "old": self.old, "slow": self.slow}
        if weights not in snapshots:
            raise ValueError(f"weights must be 'policy', 'old' or 'slow', got {weights!r}")
        return snapshots[weights]

    @property
    def sharded(self) -> bool:
        """Return whether the weights of the denoiser are spread over the processes, which must then
        make the same passes (:mod:`dgpo.distributed.lockstep`)."""
        return self.model.sharded

    def save(
        self, directory: str | Path, weights: RollingWeights = "slow", writes: bool = True
    ) -> None:
        """Write the trained weights as diffusers reads them.

        Collective if they are sharded: all processes call it, and only one ``writes``.

        ``pipe.load_lora_weights(directory)`` reads a LoRA, its alpha included. The LoRA of a second
        expert lies in ``directory/transformer_2`` and is read with
        ``load_into_transformer_2=True``. A fully trained denoiser is written to
        ``directory/transformer`` (or ``unet``) in the precision in which it samples;
        ``from_pretrained`` of its class reads it.

        Raises:
            ValueError: there are no weights of that name.
        """
        snapshot, folder = self._snapshot(weights), Path(directory)
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        self.masters.write()
        with nullcontext() if snapshot is None else snapshot.swapped():
            if self.lora is not None:
                if writes:
                    lora_files.save(self.model.pipe, self.model.denoisers, folder)
                return
            for name, denoiser in self.model.denoisers.items():
                complete = _complete(denoiser, writes)
                if writes:
                    complete.save_pretrained(folder / name)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained weights and their averages by name, sharded as the weights are."""
        # no copies: who saves them reads them, who loads them writes into them
        state = {f"policy.{name}": p.detach() for name, p in self._named.items()}
        for kind, snapshot in (("old", self.old), ("slow", self.slow)):
            for name, tensor in zip(self._named, snapshot.tensors, strict=True):
                state[f"{kind}.{name}"] = tensor
        return state

    def refuse_other(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a state whose names or shapes are not those of this policy.

        Raises:
            UserError: they differ.
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
    """Return the denoiser itself, or one that is put together from the pieces of all processes.

    Collective if it is sharded. Where it is not ``wanted`` the result is None.
    """
    kind = plain_class(denoiser)
    if kind is type(denoiser):
        return denoiser
    state: dict[str, Tensor] = {}
    for name, tensor in denoiser.state_dict().items():
        # every process gathers every tensor, in one order, also where nobody wants it
        gathered = whole(tensor)
        if wanted:
            state[name] = gathered.cpu()
    if not wanted:
        return None
    with torch.device("meta"):  # the weights are assigned, so none need be made
        made = kind.from_config(denoiser.config)
    made.load_state_dict(state, assign=True)
    return made


def _unfreeze(denoisers: Mapping[str, nn.Module]) -> None:
    for name, denoiser in denoisers.items():
        narrow = {p.dtype for p in denoiser.parameters() if p.dtype.itemsize < 2}
        if narrow:
            raise UserError(
                f"lora: null trains all of {name}, whose weights are {narrow.pop()}, in which "
                "nothing can be trained. Use weights in bfloat16, float16 or float32, or a LoRA"
            )
        denoiser.requires_grad_(True)


__all__ = ["LoraSettings", "Policy", "RollingWeights", "Weights"]
