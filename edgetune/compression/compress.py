"""Run or adapter folder → a folder with a small adapter, and back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edgetune.compression.confidence import refit_small
from edgetune.compression.finish import can_finish
from edgetune.compression.measure import TaskMetric
from edgetune.compression.search import STEPS, Compressed, Search, SizeTrial, sizes_of
from edgetune.core.errors import AdapterError, ExportError, OutputError
from edgetune.core.files import whole_folder
from edgetune.core.layout import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECIPE
from edgetune.core.progress import Progress
from edgetune.export.inputs.small_adapter import read_whole, write_plain, write_small
from edgetune.export.inputs.sources import read_source
from edgetune.runtime.adapters.lora import read_lora, refuse_if

MAX_LOSS = 0.005


def compress(
    run: Path,
    out: Path,
    *,
    max_loss: float | None = None,
    rank: float | None = None,
    bits: int | None = None,
    steps: int | None = None,
    rows: int | None = None,
    data: Path | None = None,
    base_name: str | None = None,
    progress: Progress,
) -> Compressed:
    """Write the smallest form of the adapter in `run` that loses at most `max_loss` of its task
    metric to `out`: the adapter, and the run's recipe where it has one.

    `rank` and `bits` leave only such sizes; both together are taken as they are, unless `max_loss`
    is given. `steps`: of the training against the codes, for sizes that lose too much; not given:
    100 where the run says what it learned from. `rows` 0: nothing is measured. OutputError where
    something is at `out`; ExportError where no size holds; the errors of adapter, data and base.
    """
    _check_place(out)
    source = read_source("adapter", run)
    folder = source.folder
    if not (folder / ADAPTER_CONFIG).is_file():
        raise AdapterError(
            "all weights of this run were trained: there is no adapter to make small",
            where=str(run),
            fix="Export it with --precision int8 or int4.",
        )
    read = read_whole(folder)
    forced = rank is not None and bits is not None
    if rows == 0 and not forced:
        raise ExportError(
            "no size can be chosen without rows",
            where="--task-rows 0",
            fix="Give --rank and --bits.",
        )
    bound = MAX_LOSS if max_loss is None and not forced else max_loss
    why_not = can_finish(folder)
    if steps and why_not:
        raise ExportError(
            f"there is nothing to train on: {why_not}", where=str(run), fix="--steps 0"
        )
    task = (
        None
        if rows == 0
        else TaskMetric(folder, rows=rows, data=data, base_name=base_name, say=progress.say)
    )
    search = Search(
        read,
        task,
        max_loss=bound,
        steps=0 if why_not else STEPS if steps is None else steps,
        progress=progress,
    )
    sizes = sizes_of(read, rank=rank, bits=bits)
    chosen = search.forced(sizes[0]) if forced and bound is None else search.smallest(sizes)
    found = Compressed(
        tuple(search.trials),
        chosen,
        (folder / ADAPTER_WEIGHTS).stat().st_size,
        search.reference,
    )
    sure = refit_small(source, task, search.made[chosen])
    more: dict[str, Any] = {"compressed": chosen_size(found)}
    if sure is not None:
        progress.say(f"confidence: {sure.line()}")
        more["compressed"]["confidence"] = sure.to_dict()
        more |= {} if sure.kept else {"confidence": dict(sure.confidence)}
    with whole_folder(out) as partial:
        write_small(search.made[chosen], partial / ADAPTER, more=more)
        if (folder.parent / RECIPE).is_file():
            shutil.copyfile(folder.parent / RECIPE, partial / RECIPE)
    return found


def decompress(folder: Path, out: Path) -> None:
    """Write a small adapter as a PEFT folder that computes the same. OutputError where something is
    at `out`; AdapterError for no small adapter.
    """
    _check_place(out)
    inner = read_source("adapter", folder).folder
    read = read_lora(inner)
    refuse_if(read.problems, inner)
    if not read.coded:
        raise AdapterError("this adapter is PEFT's own already", where=str(folder))
    write_plain(read, out)


def _check_place(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(
            "there is something at this place", where=str(out), fix="Choose another --out."
        )


def chosen_size(found: Compressed) -> dict[str, object]:
    """For edgetune_adapter.json: what was chosen, and what it was chosen by."""
    reference = found.reference
    trained = None
    if reference is not None:
        trained = {"metric": reference.metric, "value": reference.value}
        trained |= {"rows": reference.rows, "data": reference.data}
    return {"from_bytes": found.whole_bytes, "as_trained": trained} | found.trials[
        found.chosen
    ].to_dict()


def table_of(found: Compressed) -> list[str]:
    """A line for each form that was measured, the smallest first."""
    metric = "" if found.reference is None else found.reference.metric
    head = ("bytes", "rank", "bits", "steps", "ΔW kept", metric, "loss", "")
    rows: list[tuple[str, ...]] = [head]
    if found.reference is not None:
        as_trained = f"{found.reference.value:.4f}"
        rows.append((f"{found.whole_bytes:,}", "", "", "", "", as_trained, "", "as trained"))
    order = sorted(range(len(found.trials)), key=lambda at: found.trials[at].bytes)
    rows += [_cells(found.trials[at], chosen=at == found.chosen) for at in order]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]


def _cells(trial: SizeTrial, *, chosen: bool) -> tuple[str, ...]:
    return (
        f"{trial.bytes:,}",
        f"{trial.rank:.3g}",
        str(trial.bits),
        str(trial.steps or ""),
        f"{trial.kept:.1%}",
        "" if trial.metric is None else f"{trial.metric:.4f}",
        "" if trial.loss is None else f"{trial.loss:+.2%}",
        "chosen" if chosen else "",
    )
