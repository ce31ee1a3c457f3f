"""`edgetune export`: adapters → bundle with proof."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgetune.cli.options import THREADS, share_of, show_verdicts
from edgetune.core.errors import ExportError
from edgetune.core.precisions import ADAPTER_PRECISIONS, PRECISIONS

BLOCK_SIZE = 32


@click.command()
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=RUN",
    help=(
        "An adapter's name and its run or PEFT folder, or a sum such as A+0.5*B of others' names or"
        " folders; repeat for several."
    ),
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The bundle folder to write."
)
@click.option("--replace", is_flag=True, help="Put the bundle in the place of an older one.")
@click.option(
    "--format",
    "form",
    default="bundle",
    show_default=True,
    type=click.Choice(["bundle", "gguf-adapter"]),
    help=(
        "A bundle, or each adapter as a GGUF file for llama.cpp: --out FILE.gguf, or a folder for"
        " several."
    ),
)
@click.option(
    "--mode",
    default="separate",
    show_default=True,
    type=click.Choice(["separate", "merged"]),
    help="Adapters as inputs, or one merged into the weights.",
)
@click.option(
    "--precision",
    type=click.Choice([*PRECISIONS, "auto"]),
    help=(
        "How weights are stored; fp16 (activations and cache too) is for GPUs; auto: the smallest"
        " that keeps within --max-loss; not given: what all adapters were trained for"
        " (base_precision), else int8."
    ),
)
@click.option(
    "--adapter-precision",
    type=click.Choice(ADAPTER_PRECISIONS),
    default="fp32",
    show_default=True,
    help=(
        "How the adapters' own numbers are stored: int8 to int2 as codes, at their own rank; what"
        " that loses is part of the proof."
    ),
)
@click.option(
    "--max-loss",
    metavar="SHARE",
    help=(
        "With --precision auto: how much of each adapter's task metric may be lost against torch in"
        " fp32, as 0.5% (of its value).  [default: 0.5%]"
    ),
)
@click.option(
    "--block-size",
    default=BLOCK_SIZE,
    show_default=True,
    type=click.Choice([16, 32, 64, 128]),
    help="Weights that share a scale.",
)
@click.option(
    "--activations",
    default="float",
    show_default=True,
    type=click.Choice(["float", "int8"]),
    help=(
        "int8: an encoder's int8 products round their inputs too (faster, less exact; --keep"
        " MODULE=fp32 spares a layer)."
    ),
)
@click.option(
    "--keep",
    multiple=True,
    metavar="MODULE=PRECISION",
    help=(
        "Another precision for modules of that name, such as down_proj=int8. int4 decoders keep"
        " lm_head=int8 unless told otherwise."
    ),
)
@click.option(
    "--quantiser",
    type=click.Choice(["rtn", "hqq", "gptq"]),
    help=(
        "How 4-bit weights are rounded: to nearest, half-quadratic (slower, no text), or to each"
        " layer's inputs from text (slowest).  [default: rtn; with --precision auto more carefully"
        " too, where that nearly suffices]"
    ),
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text for --quantiser gptq; not given: the training rows of the runs.",
)
@click.option(
    "--base",
    "base_name",
    metavar="NAME",
    help="The base model, for adapters that do not say; without --adapter: the base alone.",
)
@click.option(
    "--task-rows",
    type=click.IntRange(min=0),
    metavar="N",
    help=(
        "Validation rows (of the run's recipe) on which each adapter's task metric is taken, in"
        " torch and in the bundle; not given: 64 of a decoder, 256 of an encoder; 0: none."
    ),
)
@click.option(
    "--task-data",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Rows for the task metric, instead of the recipe's own.",
)
@click.option(
    "--allow-metric-loss",
    is_flag=True,
    help=(
        "Ship a bundle that lost more of the task metric than a point and chance, or whose rounding"
        " is too large beside the adapter's effect; the manifest says so."
    ),
)
@click.option(
    "--keep-confidence",
    is_flag=True,
    help=(
        "Ship temperature and threshold as trained; else, where weights are rounded, they are"
        " fitted again on the bundle's own answers to the run's validation rows."
    ),
)
@click.option(
    "--general",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help=(
        "WikiText-2 and STS-B, on which the base shows what its precision costs; not given:"
        " $EDGETUNE_DATASETS/general_ability."
    ),
)
@click.option(
    "--general-items",
    type=click.IntRange(min=0),
    metavar="N",
    help=(
        "How much of it: windows of 512 tokens, or pairs of sentences; not given: 6 and 400; 0:"
        " nothing."
    ),
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    metavar="N",
    help=(
        "Positions of a bundle whose base has more of them; not given: 8,192. A cache is made as"
        " long as it must be, whatever stands here."
    ),
)
@click.option("--threads", type=THREADS, help="Threads of the engine during the proof.")
def command(
    adapters: tuple[str, ...],
    out: Path,
    replace: bool,
    form: str,
    mode: str,
    precision: str | None,
    adapter_precision: str,
    max_loss: str | None,
    block_size: int,
    activations: str,
    keep: tuple[str, ...],
    quantiser: str | None,
    calibration: Path | None,
    base_name: str | None,
    task_rows: int | None,
    task_data: Path | None,
    allow_metric_loss: bool,
    keep_confidence: bool,
    general: Path | None,
    general_items: int | None,
    context: int | None,
    threads: int | None,
) -> None:
    """Turn trained adapters into a bundle, and prove that it answers as what was trained."""
    if form == "gguf-adapter":
        _gguf(adapters, out, base_name)
        return
    from edgetune.core.precisions import BITS, FLOATS
    from edgetune.export.bundle import export_bundle
    from edgetune.export.inputs.combine import FORM, resolve_sums
    from edgetune.export.proof.task_metric import TaskPlan
    from edgetune.export.proof.torch_model import precision_trained_for
    from edgetune.export.proof.verdict import ALLOW
    from edgetune.quantisation.precision import Precision

    overrides = dict(_pair(text, "--keep", "MODULE=PRECISION") for text in keep)
    for value in overrides.values():
        if value not in BITS:
            raise ExportError("unknown precision in --keep", expected=", ".join(BITS), got=value)
    pairs = [_pair(text, "--adapter", FORM) for text in adapters]
    with tempfile.TemporaryDirectory(prefix="edgetune-sum-") as folder:
        sources = resolve_sums(pairs, Path(folder))
        task = TaskPlan(
            task_rows,
            task_data,
            allowed_by=ALLOW if allow_metric_loss else "",
            keep_confidence=keep_confidence,
        )
        cost = _cost(general, general_items)
        if precision == "auto" and activations != "float":
            raise ExportError(
                "--precision auto tries no 8-bit activations",
                got=f"--activations {activations}",
                fix="Leave one of them out.",
            )
        if precision == "auto":
            _smallest(
                sources,
                out,
                max_loss,
                block_size,
                mode=mode,
                keep=overrides,
                base_name=base_name,
                task=task,
                threads=threads,
                cost=cost,
                context=context,
                quantiser=quantiser,
                calibration=calibration,
                replace_finished=replace,
                adapter_precision=adapter_precision,
            )
            return
        if max_loss is not None:
            raise ExportError(
                "--max-loss bounds what --precision auto may lose",
                got=f"--precision {precision}",
                fix="Add --precision auto.",
            )
        precision = precision or precision_trained_for([source for _, source in sources]) or "int8"
        if precision in FLOATS and not overrides and block_size != BLOCK_SIZE:
            raise ExportError(
                "--block-size says which weights share a scale, and here none are scaled",
                got=f"--precision {precision}",
                fix="Leave it out.",
            )
        chosen = Precision(
            precision,
            block_size=block_size,
            overrides=overrides,
            quantiser=quantiser or "rtn",
            activations=activations,
        )
        manifest = export_bundle(
            sources,
            out,
            mode=mode,
            precision=chosen,
            base_name=base_name,
            threads=threads,
            calibration=calibration,
            say=lambda line: click.echo(line, err=True),
            task=task,
            cost=cost,
            context=context,
            replace_finished=replace,
            adapter_precision=adapter_precision,
        )
    size = sum(info.bytes for info in manifest.files.values()) / 1e6
    click.echo(
        f"{out}: {manifest.base.name}, {mode}, {precision}, {len(pairs)}"
        f" adapter{'s' if len(pairs) != 1 else ''}, {size:.1f} MB"
    )
    show_verdicts(manifest.proof["verdict"])


def _smallest(
    sources: Sequence[tuple[str, Path]],
    out: Path,
    max_loss: str | None,
    block_size: int,
    **options: Any,
) -> None:
    """Search, and print what was tried."""
    from edgetune.export.search import export_smallest
    from edgetune.export.search_page import trial_lines, write_page

    if block_size != BLOCK_SIZE:
        raise ExportError(
            "--precision auto tries several block sizes by itself",
            got=f"--block-size {block_size}",
            fix="Leave it out.",
        )
    found = export_smallest(
        sources,
        out,
        max_loss=share_of(max_loss or "0.5%"),
        say=lambda line: click.echo(line, err=True),
        **options,
    )
    for line in trial_lines(found):
        click.echo(line)
    trial = found.trials[found.chosen]
    click.echo(
        f"{out}: {found.manifest.base.name}, {found.manifest.mode}, {trial.name}, {trial.mb:.1f}"
        f" MB; plots in {write_page(found, out)}"
    )
    show_verdicts(found.manifest.proof["verdict"])


def _cost(general: Path | None, items: int | None) -> Any:
    """On what the precision's cost is taken; None, with a line where nobody asked for that, where
    the sets are not known.
    """
    from edgetune.export.proof.cost import CostPlan

    root = os.environ.get("EDGETUNE_DATASETS")
    if items == 0:
        return None
    if general is None and root is None:
        click.echo(
            "what this precision costs the base is not measured: --general FOLDER says where"
            " WikiText-2 and STS-B are",
            err=True,
        )
        return None
    return CostPlan(general or Path(root or "") / "general_ability", items)


OF_ADAPTERS = ("adapters", "out", "form", "base_name")  # what a GGUF adapter takes


def _gguf(adapters: tuple[str, ...], out: Path, base_name: str | None) -> None:
    """Adapters as GGUF files; what says how a bundle's base is stored would silently do nothing
    here.
    """
    from edgetune.export.gguf import export_gguf_adapters
    from edgetune.export.inputs.combine import FORM, resolve_sums

    context = click.get_current_context()
    if given := [
        name
        for name in sorted(set(context.params) - set(OF_ADAPTERS))
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ExportError(
            "a GGUF adapter holds no base model, so there is nothing that this could say",
            where="--format gguf-adapter",
            got=names,
        )
    with tempfile.TemporaryDirectory(prefix="edgetune-sum-") as folder:
        sources = resolve_sums([_pair(text, "--adapter", FORM) for text in adapters], Path(folder))
        files = export_gguf_adapters(
            sources, out, base_name=base_name, say=lambda line: click.echo(line, err=True)
        )
    for file in files:
        click.echo(f"{file}: GGUF adapter, {file.stat().st_size / 1e6:.1f} MB")


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ExportError(f"cannot read {option}", expected=form, got=text)
    return name, value
