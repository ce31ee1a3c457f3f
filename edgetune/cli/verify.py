"""`edgetune verify`: hashes of a bundle; with --parity the proof again."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.cli.options import THREADS


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--parity",
    is_flag=True,
    help="Prove again that it answers as what was trained (needs torch and the base model).",
)
@click.option(
    "--task-data",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --parity: take the task metric again on these rows, in torch and in the bundle.",
)
@click.option(
    "--task-rows",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --task-data: that many of them at most.",
)
@click.option("--threads", type=THREADS, help="Threads of the engine during the proof.")
def command(
    bundle: Path, parity: bool, task_data: Path | None, task_rows: int | None, threads: int | None
) -> int:
    """Check that a bundle is what was exported. Exit 1 when anything differs."""
    from edgetune.core.errors import InputError
    from edgetune.runtime.bundle.digests import verify_files
    from edgetune.runtime.bundle.manifest import read_manifest

    if task_data is not None and not parity:
        raise InputError(
            "--task-data needs torch and the base model",
            fix="Add --parity, or use `edgetune eval` for the bundle alone.",
        )
    if task_rows is not None and task_data is None:
        raise InputError(
            "--task-rows says how many rows of --task-data",
            fix="Add --task-data FILE: a bundle does not carry its recipe's rows.",
        )
    if task_data is not None:
        from edgetune.data.rows import read_rows

        read_rows(task_data)  # before the proof takes its time
    manifest = read_manifest(bundle)
    problems = list(verify_files(bundle, manifest))
    for problem in problems:
        click.echo(
            f"edgetune: {bundle}/{problem}. Copy the bundle again, or export it again.", err=True
        )
    if problems:
        return 1
    click.echo(f"{bundle}: {len(manifest.files)} files, every size and sha256 as exported")
    failed = _parity(bundle, threads) if parity else 0
    if task_data is not None:
        _task(bundle, task_data, task_rows, threads)
    return failed


def _parity(bundle: Path, threads: int | None) -> int:
    from edgetune.export.proof.prove import reprove
    from edgetune.runtime.bundle.manifest import read_manifest

    failed = False
    for name, proof in reprove(bundle, read_manifest(bundle), threads=threads).items():
        click.echo(
            f"proof {name}: {'passed' if proof.passed else 'FAILED: ' + '; '.join(proof.failures)};"
            f" {proof.line()}"
        )
        failed |= not proof.passed
    return int(failed)


def _task(bundle: Path, data: Path, rows: int | None, threads: int | None) -> None:
    from edgetune.export.proof.prove import remeasure
    from edgetune.export.proof.task_metric import TaskPlan
    from edgetune.runtime.bundle.manifest import read_manifest

    remeasure(bundle, read_manifest(bundle), TaskPlan(rows, data), threads=threads, say=click.echo)
