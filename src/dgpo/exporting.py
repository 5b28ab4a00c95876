"""``dgpo export``: a run's weights as other programs read them.

What is cheap is checked before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpo import registry
from dgpo.disk import CHECKPOINT_TENSORS, replace_folder
from dgpo.errors import UserError
from dgpo.recipe.files import read_recipe

FORMATS = ("diffusers", "peft", "kohya", "comfyui")
WEIGHTS = ("slow", "policy", "old")
_FILE = ".safetensors"


def export(
    run: str | Path,
    format: str | None = None,
    *,
    output: str | Path | None = None,
    weights: str = "slow",
    merge: bool = False,
    model: Any = None,
) -> str:
    """Write the trained weights of a run for another program.

    Args:
        run: a run folder, or one of its checkpoints.
        format: ``diffusers``, ``peft``, ``kohya`` or ``comfyui``; None for ``diffusers``.
        output: a folder, or a ``.safetensors`` file; None for ``export/FORMAT`` in the run.
        weights: the slow average, which is evaluated; the ``policy`` as it was trained last; or
            the algorithm's ``old`` policy.
        merge: write a whole pipeline with the trained weights in it instead.
        model: the pipeline that is merged into, or its name; None for the recipe's.

    Returns:
        A sentence that says what was written.

    Raises:
        UserError: there is no such run, format or weights, something is at ``output`` already, or
            the run trained all weights, which only ``merge`` can write.
    """
    place = Path(run).expanduser()
    one = (place / CHECKPOINT_TENSORS).is_file()
    home = place.absolute().parents[1] if one else place
    form = "merged" if merge else format or FORMATS[0]
    target = home / "export" / (form if weights == "slow" else f"{form}-{weights}")
    target = target if output is None else Path(output).expanduser()
    _check(home, target, format, weights, merge)
    # as it stands there: a run that was begun in Python has no prompts to validate
    recipe = read_recipe(home / "recipe.yaml")
    found = place if one else _checkpoint(recipe, home, weights)
    if merge:
        pipe = _merged(recipe, home, found, weights, model)
        replace_folder(target, pipe.save_pretrained)
        return f"{type(pipe).__name__} with the trained weights in {target}"
    from dgpo.models.weights import lora_files

    lora = lora_files.read(found or home / "lora", weights)
    if target.suffix == _FILE:
        lora_files.write(lora, target, form)
    else:
        replace_folder(target, lambda folder: lora_files.write(lora, folder, form))
    return f"{len(lora.tensors)} tensors for {form} in {target}"


def _check(home: Path, target: Path, format: str | None, weights: str, merge: bool) -> None:
    """Refuse what cannot be exported, at no cost."""
    if not (home / "recipe.yaml").is_file():
        raise UserError(f"export {home}: this folder holds no run (no recipe.yaml)")
    if format is not None and (merge or format not in FORMATS):
        why = "--merge writes a pipeline" if merge else f"it is not one of {', '.join(FORMATS)}"
        raise UserError(f"--format {format}: {why}")
    if weights not in WEIGHTS:
        raise UserError(f"--weights {weights}: it is not one of {', '.join(WEIGHTS)}")
    if not merge and read_recipe(home / "recipe.yaml").get("lora", {}) is None:
        raise UserError(
            f"export {home}: the run trained all weights and has no LoRA; --merge writes the whole "
            "pipeline"
        )
    if not merge and format in (None, "diffusers") and (home / "lora/adapter_config.json").exists():
        raise UserError(
            f"export {home}: diffusers has no loader of LoRAs for its pipeline; use --format peft"
        )
    if target.suffix == _FILE and (merge or format == "peft"):
        raise UserError(f"--output {target}: this is written as a folder")
    if target.exists():
        raise UserError(f"--output {target}: it is there already; name another place")


def _checkpoint(recipe: Mapping[str, Any], home: Path, weights: str) -> Path | None:
    """Return the checkpoint that holds weights other than those that the run has written."""
    if weights == "slow":
        return None
    from dgpo.algorithms.base import Algorithm
    from dgpo.training.checkpoint_files import find_checkpoint

    name = recipe["algorithm"]["name"]
    if weights == "old" and not issubclass(registry.resolve("algorithm", name), Algorithm):
        raise UserError(f"--weights old: {name} keeps no old policy")
    return find_checkpoint(home / "checkpoints").folder


def _merged(
    recipe: Mapping[str, Any], home: Path, found: Path | None, weights: str, model: Any
) -> Any:
    """Return the pipeline of a run with its trained weights in it."""
    from dgpo.models.load import load_pipeline, quiet
    from dgpo.models.loras import put_lora
    from dgpo.models.weights.lora_files import read, read_weights

    pipe = recipe["model"] if model is None else model
    if isinstance(pipe, (str, Path)):
        quiet()
        own = (recipe.get("memory") or {}).get("vae_precision")
        pipe = load_pipeline(str(pipe), recipe["precision"], vae_precision=own)
    if recipe.get("lora", {}) is not None:
        put_lora(pipe, read(found or home / "lora", weights), fresh=True, merge=True)
        return pipe
    if found is not None:
        for name, tensor in read_weights(found, weights).items():
            part, _, parameter = name.partition(".")
            getattr(pipe, part).get_parameter(parameter).data.copy_(tensor)
        return pipe
    for folder in sorted(path for path in (home / "model").glob("*") if path.is_dir()):
        trained = type(getattr(pipe, folder.name)).from_pretrained(folder)
        getattr(pipe, folder.name).load_state_dict(trained.state_dict())
    return pipe
