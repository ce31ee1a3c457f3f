"""`edgetune verify`: hashes of a bundle; with --parity the proof again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.options import THREADS, show_verdicts

if TYPE_CHECKING:
    from edgetune.runtime.bundle.manifest import Manifest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    metavar="PUB.pem",
    help="Check that this public key signed it, every file; also for an adapter's folder.",
)
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
@click.option(
    "--allow-metric-loss",
    is_flag=True,
    help="With --parity: say what was lost, and exit 0 all the same.",
)
@click.option("--threads", type=THREADS, help="Threads of the engine during the proof.")
def command(
    bundle: Path,
    key: Path | None,
    parity: bool,
    task_data: Path | None,
    task_rows: int | None,
    allow_metric_loss: bool,
    threads: int | None,
) -> int:
    """Check that a bundle is what was exported, and with --key that its publisher signed it. Exit 1
    when anything differs.
    """
    from edgetune.core.errors import InputError
    from edgetune.core.layout import MANIFEST
    from edgetune.runtime.bundle.digests import verify_files
    from edgetune.runtime.bundle.manifest import read_manifest

    if task_data is not None and not parity:
        raise InputError(
            "--task-data needs torch and the base model",
            fix="Add --parity, or use `edgetune eval` for the bundle alone.",
        )
    if allow_metric_loss and not parity:
        raise InputError("--allow-metric-loss is for the proof again", fix="Add --parity.")
    if task_rows is not None and task_data is None:
        raise InputError(
            "--task-rows says how many rows of --task-data",
            fix="Add --task-data FILE: a bundle does not carry its recipe's rows.",
        )
    if task_data is not None:
        from edgetune.data.rows import read_rows

        read_rows(task_data)  # before the proof takes its time
    if key is not None:
        if not _is_signed(bundle, key):
            return 1
        if not parity and not (bundle / MANIFEST).exists():  # an adapter has no hashes of its own
            return 0
    manifest = read_manifest(bundle)
    problems = list(verify_files(bundle, manifest))
    for problem in problems:
        click.echo(
            f"edgetune: {bundle}/{problem}. Copy the bundle again, or export it again.", err=True
        )
    if problems:
        return 1
    click.echo(f"{bundle}: {len(manifest.files)} files, every size and sha256 as exported")
    if not parity:
        return 0
    return _parity(bundle, manifest, task_data, task_rows, threads, allow_loss=allow_metric_loss)


def _is_signed(folder: Path, key: Path) -> bool:
    """Whether a folder is as its publisher signed it; why not is said."""
    from edgetune.core.errors import SignatureError
    from edgetune.runtime.signature.folder import check_signature
    from edgetune.runtime.signature.keys import read_public_key

    public = read_public_key(key)
    try:
        signed = check_signature(folder, public)
    except SignatureError as error:
        click.echo(f"edgetune: {error}", err=True)
        return False
    number = "" if signed.version is None else f", version {signed.version}"
    click.echo(f"{folder}: {len(signed.files)} files as signed by {key}{number}")
    return True


def _parity(
    bundle: Path,
    manifest: Manifest,
    data: Path | None,
    rows: int | None,
    threads: int | None,
    *,
    allow_loss: bool,
) -> int:
    from edgetune.export.proof.prove import proof_line, remeasure, reprove
    from edgetune.export.proof.task_metric import TaskPlan
    from edgetune.export.proof.verdict import ALLOW, REFUSED, verdicts_again

    proven = reprove(bundle, manifest, threads=threads)
    for engine, found in proven.items():
        for name, proof in found.items():
            click.echo(proof_line(name, engine, proof))
    plan = TaskPlan(rows, data, allowed_by=ALLOW if allow_loss else "")
    tasks = (
        {} if data is None else remeasure(bundle, manifest, plan, threads=threads, say=click.echo)
    )
    verdicts = verdicts_again(manifest, proven, tasks, allowed_by=plan.allowed_by)
    show_verdicts({name: verdict.to_dict() for name, verdict in verdicts.items()})
    passed = all(proof.passed for found in proven.values() for proof in found.values())
    return int(not passed or any(verdict.value == REFUSED for verdict in verdicts.values()))
