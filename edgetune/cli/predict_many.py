"""`edgetune predict` into a folder: rows in parts, resumable, by shards or by workers of Ray."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import Command, ray_options

if TYPE_CHECKING:
    from edgetune.bulk.parts import Done


class Shard(click.ParamType):  # type: ignore[type-arg]
    """`i/n`, from 1."""

    name = "i/n"

    def convert(self, value: Any, param: Any, context: Any) -> tuple[int, int]:
        """(i, n)."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value))
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            self.fail(f"{value!r} is no shard; write i/n, such as 1/4 to 4/4", param, context)
        return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Many:
    """How a folder of parts is filled."""

    shard: tuple[int, int] | None
    ray: str | None
    workers: int | None
    part_rows: int | None


ray_answering = ray_options(
    ray=(
        "With a folder: workers of Ray answer (the extra `ray`), here or on the cluster at ADDRESS,"
        " where bundle and files must lie at the same paths."
    ),
    workers="With --ray: how many processes answer (default: one a processor of the cluster).",
)


def many_options(command: Command) -> Command:
    """The options of a folder of parts."""
    for option in (
        click.option(
            "--part-rows",
            type=click.IntRange(1),
            help="With a folder: rows of a part (default 1000).",
        ),
        ray_answering,
        click.option(
            "--shard",
            type=Shard(),
            help="With a folder: this process answers the i-th of n shares of the parts.",
        ),
    ):
        command = option(command)
    return command


def is_many(output: str, *options: Any) -> bool:
    """Rows go into a folder of parts. UsageError for options that only a folder has."""
    folder = output.endswith("/") or "://" in output or Path(output).is_dir()
    if not folder and any(option is not None for option in options):
        raise click.UsageError(
            "--shard, --ray, --workers and --part-rows belong to an --output that is a folder"
            f" (write {output}/)"
        )
    return folder


def answer_many(
    bundle: Path,
    source: str,
    output: str,
    many: Many,
    *,
    adapter: str | None,
    threads: int | None,
    settings: dict[str, Any],
    **opening: Any,
) -> None:
    """Answer what is not answered yet; say how far it is, and what could not be answered."""
    if source == "-":
        raise click.UsageError("a folder of parts is made of files, not of standard input")
    if many.ray is not None and many.shard is not None:
        raise click.UsageError("--ray divides the parts itself: leave --shard out")
    if many.workers is not None and many.ray is None:
        raise click.UsageError("--workers belongs to --ray")
    from edgetune.bulk.answers import Answerer
    from edgetune.bulk.parts import ROWS, answer_here, plan
    from edgetune.bulk.ray_workers import answer_by_ray

    by_ray = many.ray is not None
    if by_ray:  # whose workers have working folders of their own
        bundle, source, output = bundle.resolve(), _absolute(source), _absolute(output)
    answers = Answerer(
        bundle,
        adapter=adapter,
        threads=(threads or 1) if by_ray else threads,
        **opening,
        **settings,
    )
    about = settings | {key: opening[key] for key in ("truncate", "threshold")}
    job = plan(source, output, answers, rows=many.part_rows or ROWS, about=about)
    if many.shard is not None:
        job = job.shard(*many.shard)
    parts = job.unanswered()
    if answered := len(job.parts) - len(parts):
        click.echo(f"{answered} of {len(job.parts)} parts are answered already")
    if parts:
        finished: Iterator[Done] = (
            answer_by_ray(
                answers,
                job,
                parts,
                address=many.ray or "",
                workers=many.workers,
                threads=threads or 1,
            )
            if by_ray
            else answer_here(answers, job, parts)
        )
        click.echo(f"{_follow(finished, parts)} rows answered: {output}")
    else:
        click.echo(f"nothing is left to answer: {output}")
    if failed := job.failed():  # at earlier calls too
        rows, one = sum(part.end - part.first for part in job.parts), failed[0]
        click.echo(
            f"{len(failed)} of {rows} rows could not be answered, listed in failed-*.json there;"
            f" the first is row {one.row} of {one.source}: {one.error}",
            err=True,
        )
        raise SystemExit(1)


def _absolute(place: str) -> str:
    """A path from the root; URLs stay."""
    return place if "://" in place else str(Path(place).absolute())


def _follow(finished: Iterator[Done], parts: Sequence[Any]) -> int:
    """Show progress; the rows of the parts."""
    rows = 0
    begun = time.monotonic()
    for at, done in enumerate(finished, 1):
        rows += done.rows
        if sys.stderr.isatty():
            speed = rows / max(time.monotonic() - begun, 1e-9)
            click.echo(
                f"\r{at}/{len(parts)} parts, {rows} rows, {speed:.1f} rows/s",
                nl=at == len(parts),
                err=True,
            )
    return rows
