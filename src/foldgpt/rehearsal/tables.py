"""A rehearsal as text for a terminal."""

from __future__ import annotations

from rich.table import Table

from foldgpt.formats import duration, gigabytes, millions, percent
from foldgpt.rehearsal.expectation import Expectation
from foldgpt.rehearsal.rehearse import Rehearsal


def expectation_table(rehearsal: Rehearsal, *, teraflops: float | None = None, devices: int = 1) -> Table:
    """One row for each run: parameters left, the most memory of a stage on one device, operations, and time.

    Args:
        rehearsal: what was found.
        teraflops: TFLOP/s that a device sustains; without it nothing is said of time.
        devices: how many there are.
    """
    table = Table()
    table.add_column("run")
    timed = ["time"] if teraflops is not None else []
    for column in ("in blocks", "of the source", "trained", "most memory", "in", "operations", *timed):
        table.add_column(column, justify="right")
    for name, row in rehearsal.rows.items():
        stage, memory = max(row.memory.items(), key=lambda item: item[1].total)
        table.add_row(
            name,
            millions(row.kept_block_parameters),
            percent(row.kept_block_parameters / row.block_parameters),
            millions(row.num_trained) if row.num_trained else "–",
            gigabytes(memory.total),
            stage,
            _peta(sum(row.flops.values())),
            *([] if teraflops is None else [duration(row.seconds(teraflops * 1e12, devices=devices))]),
        )
    return table


def expectation_lines(rehearsal: Rehearsal, *, teraflops: float | None = None, devices: int = 1) -> list[str]:
    """Memory stage by stage of the heaviest run, the operations of each stage, and what is not in it.

    The arguments are those of `expectation_table`.
    """
    heaviest = max(rehearsal.rows.values(), key=lambda row: max(memory.total for memory in row.memory.values()))
    lines = [
        f"{rehearsal.model}: {millions(heaviest.parameters)} parameters, {millions(heaviest.block_parameters)} of them "
        "in blocks. The recipe runs through on a tiny random model of this architecture.",
        *_memory_lines(heaviest),
    ]
    for name, row in rehearsal.rows.items():
        stages = ", ".join(f"{stage} {_peta(flops)}" for stage, flops in row.flops.items())
        lines.append(f"Operations, {name}: {stages}.")
    takes = " (--tflops says how long that takes at the speed of your device)"
    if teraflops is not None:
        total = duration(rehearsal.seconds(teraflops * 1e12, devices=devices))
        whose = "one device" if devices == 1 else f"each of {devices} devices"
        takes = f": {total} at {teraflops:g} TFLOP/s sustained on {whose} (--tflops, --devices)"
    lines.append(
        f"All together {_peta(rehearsal.flops)}{takes}. Not counted: the time of the fits of the compensation and of "
        "shared weights (share.fit), what share.method auto and donor best measure, what train_blocks behind saves, "
        "tasks, perplexity on whole texts, reading and writing."
    )
    if devices > 1:
        lines.append(_sharing_line(rehearsal, devices))
    lines.append(f"In the rehearsal {'; '.join(rehearsal.left_out)}.")
    return lines


def _sharing_line(rehearsal: Rehearsal, devices: int) -> str:
    """Which stages several devices share, and how that is had."""
    shared = {stage: None for row in rehearsal.rows.values() for stage in row.flops if stage in row.on_all_devices}
    if not shared:
        return f"Nothing in this is shared by {devices} devices, only a recovery would be: it all runs on one."
    return (
        f"Shared by the {devices} devices: {', '.join(shared)}, if `foldgpt recover` is run by `accelerate launch` or "
        "`torchrun`. All else runs on one, and so does `foldgpt run` or `compare` as a whole."
    )


def _memory_lines(row: Expectation) -> list[str]:
    lines = []
    for stage, memory in row.memory.items():
        parts = {
            "weights": memory.weights,
            "verified beside it" if stage == "fold and verify" else "teacher": memory.teacher,
            "states" if stage in ("search", "fits") else "activations": memory.activations,
            "optimizer": memory.optimizer,
            "logits": memory.other,
        }
        shown = ", ".join(f"{name} {gigabytes(value)}" for name, value in parts.items() if value)
        lines.append(f"Memory, {stage}: {gigabytes(memory.total)} ({shown}).")
    return lines


def _peta(flops: float) -> str:
    return f"{flops / 1e15:,.1f} PFLOP" if flops >= 1e14 else f"{flops / 1e12:,.1f} TFLOP"
