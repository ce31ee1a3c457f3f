"""`edgetune bench`: what `make bench` measured, compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.options import slower_option

if TYPE_CHECKING:
    from edgetune.runtime.check.benchmarks import Compared


@click.group("bench")
def command() -> None:
    """Compare files of results that `make bench` wrote."""


@command.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@slower_option("Worse by less is no regression.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Write every ratio there.",
)
def compare(a: Path, b: Path, allow_slower: float, json_file: Path | None) -> int:
    """Compare B with A: the ratio B / A of each measure with its interval (98 %), and what else
    changed: machine, versions, commands.

    Exit 0: nothing of edgetune's is worse; 1: something is; 3: too noisy to tell. Peers are shown
    and decide nothing.
    """
    from edgetune.core.files import write_json
    from edgetune.runtime.check.benchmarks import compared, differences, overall, read_results
    from edgetune.runtime.check.report import WORDS

    before, after = read_results(a), read_results(b)
    found = compared(before, after, allowed=allow_slower / 100)
    changed = list(differences(before, after))
    for what, old, new in changed:
        click.echo(f"{what}: {old} → {new}")
    click.echo("".join(["\n" if changed else "", "\n".join(_lines(found))]))
    state = overall(found)
    click.echo(WORDS[state])
    if json_file is not None:
        document = {"a": str(a), "b": str(b), "state": state, "changed": changed}
        write_json(json_file, document | {"measures": [one.to_dict() for one in found]})
    return {"ok": 0, "slower": 1, "noisy": 3}[state]


def _lines(found: list[Compared]) -> list[str]:
    """A line for each measure, in columns."""
    from edgetune.runtime.check.report import WORDS

    rows: list[tuple[str, ...]] = [("measure", "A", "B", "B / A", "98 %", "")]
    for one in found:
        name = f"{one.benchmark}: {one.title}, {one.figure}"
        sides = (f"{value:.4g} {one.unit}" for value in (one.before, one.after))
        reach = "–" if one.low == one.high else f"{one.low:.3f} to {one.high:.3f}"
        state = "peer" if one.peer else WORDS.get(one.state, one.state)
        rows.append((name, *sides, f"{one.ratio:.3f}", reach, state))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join(map(str.ljust, row, [*widths, 0])).rstrip() for row in rows]
