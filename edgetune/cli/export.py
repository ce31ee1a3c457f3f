"""`edgetune export`: adapters → bundle with proof."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from edgetune.errors import ExportError


@click.command()
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=RUN", help="An adapter's name and its run or PEFT folder, or a sum such as A+0.5*B of others' names or folders; repeat for several.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The bundle folder to write.")
@click.option("--format", "form", default="bundle", show_default=True, type=click.Choice(["bundle", "gguf-adapter"]), help="A bundle, or each adapter as a GGUF file for llama.cpp: --out FILE.gguf, or a folder for several.")
@click.option("--mode", default="separate", show_default=True, type=click.Choice(["separate", "merged"]), help="Adapters as inputs, or one merged into the weights.")
@click.option("--precision", type=click.Choice(["fp32", "int8", "int4"]), help="How weights are stored; not given: what all adapters were trained for (base_precision), else int8.")
@click.option("--block-size", default=32, show_default=True, type=click.Choice([16, 32, 64, 128]), help="Weights that share a scale.")
@click.option("--keep", multiple=True, metavar="MODULE=PRECISION", help="Another precision for modules of that name, such as down_proj=int8. int4 decoders keep lm_head=int8 unless told otherwise.")
@click.option("--quantiser", default="rtn", show_default=True, type=click.Choice(["rtn", "hqq", "gptq"]), help="How 4-bit weights are rounded: to nearest, half-quadratic (slower, no text), or to each layer's inputs from text (slowest).")
@click.option("--calibration", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Text for --quantiser gptq; not given: the training rows of the runs.")
@click.option("--base", "base_name", metavar="NAME", help="The base model, for adapters that do not say; without --adapter: the base alone.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine during the proof.")
def command(
    adapters: tuple[str, ...], out: Path, form: str, mode: str, precision: str | None, block_size: int, keep: tuple[str, ...], base_name: str | None, threads: int | None,
    quantiser: str, calibration: Path | None,
) -> None:
    """Turn trained adapters into a bundle, and prove that it answers as what was trained."""
    if form == "gguf-adapter":
        _gguf(adapters, out, base_name)
        return
    from edgetune.export.bundle import export_bundle
    from edgetune.export.combine import FORM, resolve_sums
    from edgetune.export.lower import BITS, Precision
    from edgetune.export.reference import precision_trained_for

    overrides = dict(_pair(text, "--keep", "MODULE=PRECISION") for text in keep)
    for value in overrides.values():
        if value not in BITS:
            raise ExportError("unknown precision in --keep", expected=", ".join(BITS), got=value)
    pairs = [_pair(text, "--adapter", FORM) for text in adapters]
    with tempfile.TemporaryDirectory(prefix="edgetune-sum-") as folder:
        sources = resolve_sums(pairs, Path(folder))
        precision = precision or precision_trained_for([source for _, source in sources]) or "int8"
        chosen = Precision(precision, block_size=block_size, overrides=overrides, quantiser=quantiser)
        manifest = export_bundle(
            sources, out, mode=mode, precision=chosen, base_name=base_name, threads=threads, calibration=calibration,
            say=lambda line: click.echo(line, err=True),
        )  # fmt: skip
    size = sum(info.bytes for info in manifest.files.values()) / 1e6
    click.echo(f"{out}: {manifest.base.name}, {mode}, {precision}, {len(pairs)} adapter{'s' if len(pairs) != 1 else ''}, {size:.1f} MB")


OF_BUNDLES = ("mode", "precision", "block_size", "keep", "threads", "quantiser", "calibration")


def _gguf(adapters: tuple[str, ...], out: Path, base_name: str | None) -> None:
    """Adapters as GGUF files; what says how a bundle's base is stored would silently do nothing here."""
    from edgetune.export.combine import FORM, resolve_sums
    from edgetune.export.gguf_adapter import export_gguf_adapters

    context = click.get_current_context()
    if given := [name for name in OF_BUNDLES if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ExportError("a GGUF adapter holds no base model, so there is nothing that this could say", where="--format gguf-adapter", got=names)
    with tempfile.TemporaryDirectory(prefix="edgetune-sum-") as folder:
        sources = resolve_sums([_pair(text, "--adapter", FORM) for text in adapters], Path(folder))
        files = export_gguf_adapters(sources, out, base_name=base_name, say=lambda line: click.echo(line, err=True))
    for file in files:
        click.echo(f"{file}: GGUF adapter, {file.stat().st_size / 1e6:.1f} MB")


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ExportError(f"cannot read {option}", expected=form, got=text)
    return name, value
