"""Say what was measured of a model's passes, and what would make them faster."""

from __future__ import annotations

from collections.abc import Sequence

from dgpo.planning.measure import FULL, Measured


def table(found: Sequence[Measured]) -> str:
    """Return what was measured, a line for each pass."""
    rows = [("pass", "rows", "ms", "ms a row", "host ms", "TFLOP", "MFU", "peak GB", "waits")]
    rows += [(one.name, str(one.rows), *_figures(one)) for one in found]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, wide[1:], strict=True)]
        lines.append("  ".join([f"{first:<{wide[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def _figures(one: Measured) -> tuple[str, ...]:
    if one.error is not None:
        return (one.error[:60], *[""] * 6)
    return (
        f"{one.ms:.1f}",
        f"{_ms_a_row(one):.2f}",
        f"{one.host_ms:.1f}",
        f"{one.tflop:.3g}",
        "" if one.mfu is None else f"{one.mfu:.0%}",
        "" if one.peak_gb is None else f"{one.peak_gb:.1f}",
        str(sum((one.waits or {}).values())),
    )


def told_of_waits(found: Sequence[Measured]) -> list[str]:
    """Return where the host waits for the device, a line for each place and pass."""
    lines = {
        f"  {count} in {one.name}: {place}": None
        for one in found
        for place, count in (one.waits or {}).items()
    }
    return ["the host waits for the device", *lines] if lines else []


def advice(found: Sequence[Measured], compiled: Sequence[Measured], precision: str) -> list[str]:
    """Return what would make the measured passes faster, a line each.

    Args:
        found: passes of one or more numbers of rows.
        compiled: the same with compiled blocks; empty where that was not measured.
        precision: the precision of the weights.
    """
    fits = {(one.name, one.rows): one for one in found if one.error is None}
    on_gpu = any(one.peak_gb is not None for one in found)
    said = []
    if precision == "float32" and on_gpu:
        said.append("precision=bfloat16: a GPU's peak in float32 is a fraction of that.")
    trained = sorted((one for one in fits.values() if one.name == "training"), key=_rows)
    best = min(trained, key=_ms_a_row, default=None)
    if best is not None and (gain := _ms_a_row(trained[0]) / _ms_a_row(best)) > _MATTERS:
        said.append(
            f"train.micro_batch={best.rows}: {gain:.2f} times as fast as {trained[0].rows} at once"
        )
    pairs = [(one, fits.get(("policy", rows))) for (name, rows), one in fits.items()
             if name == "reference"]  # fmt: skip
    ratio = max((policy.ms / ref.ms for ref, policy in pairs if policy), default=1.0)
    if ratio > _MATTERS:
        said.append(
            f"lora.targets: the LoRA makes a pass {ratio:.2f} times as long; name fewer layers"
        )
    again = {(one.name, one.rows): one for one in compiled if one.error is None}
    gains = [fits[key].ms / again[key].ms for key in fits.keys() & again.keys()]
    if gains and (gain := max(gains)) > _MATTERS:
        said.append(f"compiled blocks: up to {gain:.2f} times as fast")
    late = {one.name: None for one in fits.values() if one.host_ms > _LATE * one.ms}
    if late and on_gpu:
        names = ", ".join(late)
        said.append(f"the GPU waits for the host ({names}): more rows at once or compiled blocks")
    if any(one.error == FULL for one in found):
        said.append("memory.gradient_checkpointing=true or fewer rows: some passes do not fit")
    return ["what to change", *(f"  {line}" for line in said)] if said else []


_MATTERS = 1.1
"""Smaller ratios are not worth a change."""
_LATE = 0.9
"""Where the host needs a larger share of a pass for its launches, the GPU has nothing to do."""


def _rows(one: Measured) -> int:
    return one.rows


def _ms_a_row(one: Measured) -> float:
    return one.ms / one.rows
