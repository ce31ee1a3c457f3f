"""`edgetune predict`: one text, a file of rows, or what comes from standard input, answered by a
bundle.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import (
    THREADS,
    chosen_providers,
    device_option,
    engine_option,
    provider_option,
    signature_option,
    speed_line,
)
from edgetune.cli.predict_many import Many, answer_many, is_many, many_options
from edgetune.core.tasks import CLASSIFICATION, REWARD

HEADED = (CLASSIFICATION, REWARD)  # what on a decoder gives no text

if TYPE_CHECKING:
    from edgetune.runtime.tasks.runtime import Runtime

STANDARD = Path("-")


@click.command("predict")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option(
    "--adapter", metavar="NAME|FOLDER", help="An adapter of the bundle, or a PEFT adapter folder."
)
@click.option(
    "--input",
    "source",
    help=(
        "Rows to answer, in any format that training reads (.jsonl .json .csv .tsv .parquet .xlsx,"
        " also .gz or .zst): a file, a folder or a pattern; - is standard input."
    ),
)
@click.option(
    "--output",
    help=(
        "Where the answered rows go (.jsonl or .csv, also .gz), written whole or not at all; - is"
        " standard output. A name that ends with / is a folder of parts: what is answered there"
        " stays answered when the command is stopped and given again."
    ),
)
@many_options
@click.option("--max-new-tokens", type=int, help="Tokens to generate at most.")
@click.option(
    "--temperature", type=float, help="0 (default) takes the most likely token; above 0 samples."
)
@click.option("--top-k", type=int, help="Sample among the k most likely tokens.")
@click.option(
    "--top-p", type=float, help="Sample among the most likely tokens that make up this probability."
)
@click.option("--seed", type=int, help="Same seed, same samples.")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option(
    "--schema",
    type=click.Path(path_type=Path),
    help="A JSON schema file: the answer is JSON that it accepts.",
)
@click.option("--regex", help="A regular expression that the answer matches.")
@click.option(
    "--grammar",
    type=click.Path(path_type=Path),
    help="A Lark grammar file that the answer follows.",
)
@click.option(
    "--confidence",
    is_flag=True,
    default=None,
    help="With a generated answer how sure it is: the probability that it is right.",
)
@click.option(
    "--truncate", is_flag=True, help="Cut texts that are too long for an encoder or a reward."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help=(
        "A label of a lower score is no answer; not set: the adapter's own threshold, 0: every"
        " label counts."
    ),
)
@click.option("--threads", type=THREADS, help="Processor threads (default: all cores).")
@provider_option
@engine_option
@device_option
@signature_option
@click.option(
    "--no-verify", is_flag=True, help="Do not compare the bundle's hashes first (faster start)."
)
def command(
    bundle: Path,
    text: str | None,
    adapter: str | None,
    source: str | None,
    output: str | None,
    shard: tuple[int, int] | None,
    ray: str | None,
    workers: int | None,
    part_rows: int | None,
    truncate: bool,
    threshold: float | None,
    threads: int | None,
    providers: tuple[str, ...],
    engine: str,
    device_name: str | None,
    signed_by: Path | None,
    no_verify: bool,
    stop: tuple[str, ...],
    schema: Path | None,
    grammar: Path | None,
    **settings: Any,
) -> None:
    """Answer TEXT, or every row of --input, with BUNDLE. With - in place of TEXT the rows come
    from standard input, JSON Lines or a text a line, and the answered ones go to standard output.

    Rows hold "prompt", "messages" or "text", or the columns the adapter was trained on; "adapter"
    in a row chooses its adapter. Answered rows keep their fields and gain "completion" and
    "finish_reason", or "label" and "score" (where the score is too low "label" is null and
    "rejected" says which it was), "labels" and "scores", "value", or "tags", "spans" and
    "entities" (rows to tag hold "tokens" or "text"); rows of an adapter that reads two texts hold
    "text" and "text_pair"; for a reward adapter rows hold "prompt" and "completion", or "messages"
    that end with the answer, and gain "score". In a folder of parts a row that cannot be answered
    gains "error" instead of ending the command.
    """
    if text is not None and not text.strip():
        raise click.UsageError("TEXT is empty")
    if text == "-":
        text, source, output = None, source or "-", output or "-"
    if (text is None) == (source is None):
        raise click.UsageError("give one TEXT, or --input FILE with --output FILE, or -")
    if (source is None) != (output is None):
        raise click.UsageError("--input and --output belong together")
    settings |= {"stop": stop or None, "schema": _text_of(schema), "grammar": _text_of(grammar)}
    chosen = chosen_providers(providers, device_name)
    if source and output and is_many(output, shard, ray, workers, part_rows):
        answer_many(
            bundle,
            source,
            output,
            Many(shard, ray, workers, part_rows),
            adapter=adapter,
            threads=threads,
            truncate=truncate,
            threshold=threshold,
            engine=engine,
            providers=chosen,
            verify=not no_verify,
            signed_by=signed_by,
            settings={name: value for name, value in settings.items() if value is not None},
        )
        return
    from edgetune.runtime.tasks.runtime import Runtime

    with Runtime.open(
        bundle,
        threads=threads,
        providers=chosen,
        verify=not no_verify,
        engine=engine,
        signed_by=signed_by,
    ) as runtime:
        name = _adapter(runtime, adapter)
        _check_settings(runtime, name, settings, alone=source is None)
        if threshold is not None and source is None and runtime.task(name) != CLASSIFICATION:
            raise click.UsageError(
                "--threshold says below which score a label is none, and"
                f" {name or 'the base model'} gives no labels of texts"
            )
        if source is not None and output is not None:
            _answer_file(
                runtime,
                Path(source),
                Path(output),
                adapter=name,
                truncate=truncate,
                threshold=threshold,
                settings=settings,
            )
        else:
            _answer_text(
                runtime,
                text or "",
                adapter=name,
                truncate=truncate,
                threshold=threshold,
                settings=settings,
            )


def _rows(runtime: Runtime, source: Path, adapter: str | None) -> list[tuple[int, dict[str, Any]]]:
    """(line, row) of a file, read as training reads it, or of standard input."""
    from edgetune.core.errors import DataError, InputError
    from edgetune.core.tasks import GENERATION
    from edgetune.data.readers import read_lines
    from edgetune.data.rows import read_rows

    try:
        if source != STANDARD:
            return [(row.line, row.values) for row in read_rows(source).rows]
        data = sys.stdin.buffer.read()
        found = read_lines(data, "standard input")
        if found is None:
            lines = data.decode("utf-8", "replace").splitlines()
            key = "prompt" if runtime.task(adapter) == GENERATION else "text"
            texts = [(at, {key: line}) for at, line in enumerate(lines, 1) if line.strip()]
            if not texts:
                raise InputError("there is no text", where="standard input")
            return texts
        for row in found:
            if isinstance(row, DataError):
                raise row
        return [(row.line, row.values) for row in found if not isinstance(row, DataError)]
    except DataError as error:  # what a recipe could do about it is no way out here
        fix = "" if "data." in error.fix else error.fix
        raise InputError(
            error.what, where=error.where, expected=error.expected, got=error.got, fix=fix
        ) from error


def _text_of(path: Path | None) -> str | None:
    """A schema's or grammar's file, as text."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} cannot be read: {error}") from error


def _adapter(runtime: Runtime, adapter: str | None) -> str | None:
    """A name of the bundle as it is; a folder is loaded under its own name, and its notes are
    shown.
    """
    if adapter is None or adapter in runtime.adapters or not Path(adapter).is_dir():
        return adapter
    packed = runtime.load_adapter(Path(adapter).resolve().name, adapter)
    for note in packed.notes:
        click.echo(f"note: {note}", err=True)
    return packed.name


def _check_settings(
    runtime: Runtime, adapter: str | None, settings: dict[str, Any], *, alone: bool
) -> None:
    """What says how a text is generated has no meaning where none is; rows may choose an adapter
    that generates.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is not None]
    generates = runtime.manifest.is_decoder and not (alone and runtime.task(adapter) in HEADED)
    if given and not generates:
        raise click.UsageError(
            f"{', '.join(given)} {'say' if len(given) > 1 else 'says'} how a text is generated,"
            f" and {adapter or 'this bundle'} generates none"
        )


def _note_embedding(runtime: Runtime, what: str) -> None:
    """Nobody chose an adapter, and there are some: say that the base answers, with an embedding."""
    if not runtime.manifest.is_decoder and runtime.chosen(None) is None and runtime.adapters:
        names = ", ".join(runtime.adapters)
        click.echo(
            f"note: without --adapter {what} the base model's embedding; adapters here: {names}",
            err=True,
        )


def _answer_text(
    runtime: Runtime,
    text: str,
    *,
    adapter: str | None,
    truncate: bool,
    threshold: float | None,
    settings: dict[str, Any],
) -> None:
    if not runtime.manifest.is_decoder or runtime.task(adapter) == CLASSIFICATION:
        if runtime.labels(adapter) is None:
            if adapter is None:
                _note_embedding(runtime, "this is")
            click.echo(
                " ".join(f"{x:.6f}" for x in runtime.embed([text], adapter, truncate=truncate)[0])
            )
            return
        if runtime.task(adapter) == "token-classification":
            for word in runtime.tag([text], adapter, truncate=truncate)[0].words:
                click.echo(f"{word.word}\t{word.tag}\t{word.score:.4f}\t{word.start}-{word.end}")
            return
        found = runtime.classify([text], adapter, truncate=truncate, threshold=threshold)[0]
        if found.value is not None:
            click.echo(f"{found.value:.6g}")
        elif found.label is None:
            click.echo(f"(no label)\t{found.score:.4f}\trejected: {found.rejected}")
        else:
            labels = (found.likeliest,) if found.labels is None else found.labels
            click.echo(
                "\n".join(f"{label}\t{found.scores[label]:.4f}" for label in labels) or "(no label)"
            )
        return
    if runtime.task(adapter) == "reward":
        click.echo(f"{runtime.score([text], adapter, truncate=truncate)[0]:.6g}")
        return
    stream = runtime.stream(text, adapter, **settings)
    for piece in stream:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    if (done := stream.completion) is not None and done.confidence is not None:
        click.echo(f"confidence {done.confidence:.4f}", err=True)
    if done is not None and sys.stderr.isatty():
        click.echo(speed_line(done), err=True)


def _answer_file(
    runtime: Runtime,
    source: Path,
    output: Path,
    *,
    adapter: str | None,
    truncate: bool,
    threshold: float | None,
    settings: dict[str, Any],
) -> None:
    from edgetune.runtime.tasks.prediction_file import (
        answer_rows,
        requests_of,
        row_line,
        write_rows,
    )

    rows = _rows(runtime, source, adapter)
    name = "standard input" if source == STANDARD else str(source)
    requests = requests_of(runtime, rows, path=name, adapter=adapter, truncate=truncate)
    if adapter is None and (bare := sum("adapter" not in row for _, row in rows)):
        _note_embedding(runtime, f"{bare} of {len(rows)} rows get")
    answered: list[dict[str, Any]] = [{} for _ in requests]
    finished = answer_rows(runtime, requests, truncate=truncate, threshold=threshold, **settings)
    for done, (place, row) in enumerate(finished, 1):
        answered[place] = row
        if sys.stderr.isatty():
            click.echo(f"\r{done}/{len(requests)} rows", nl=done == len(requests), err=True)
    if output == STANDARD:
        click.echo("".join(map(row_line, answered)), nl=False)
        return
    write_rows(output, answered)
    click.echo(f"{len(answered)} rows answered: {output}")
