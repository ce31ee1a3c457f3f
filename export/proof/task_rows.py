"""The rows that an adapter is measured on: its recipe's validation rows, or those of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgetune.core.errors import EdgetuneError
from edgetune.core.layout import RECIPE
from edgetune.core.progress import Say
from edgetune.data.rows import Rows, read_rows, spread
from edgetune.data.splits import validation_rows
from edgetune.export.inputs.sources import AdapterSource
from edgetune.recipe.read import load_run_recipe


@dataclass(frozen=True)
class TaskRows:
    """The rows an adapter is measured on: `rows` of the `found` ones in the file, at equal
    distances.
    """

    rows: Rows
    found: int
    skip_invalid: bool
    limit: int

    @property
    def name(self) -> str:
        """The file without its folder: the manifest travels."""
        return Path(self.rows.source).name


def task_rows(source: AdapterSource, *, limit: int, data: Path | None = None) -> TaskRows | None:
    """At most `limit` rows of `data`, else of the run's own validation rows; None where there are
    none.

    DataError or RecipeError for a file that is not there any more or cannot be read.
    """
    if data is not None:
        return _chosen(read_rows(data), limit, skip_invalid=False)
    recipe_file = source.folder.parent / RECIPE
    if not recipe_file.is_file():
        return None
    recipe = load_run_recipe(recipe_file)
    stage = recipe.stage[-1]
    if stage.data.validation is None and not stage.data.hold_out:
        return None
    rows = validation_rows(stage, seed=recipe.seed)
    return _chosen(rows, limit, skip_invalid=stage.data.skip_invalid)


def _chosen(rows: Rows, limit: int, *, skip_invalid: bool) -> TaskRows:
    return TaskRows(
        replace(rows, rows=spread(rows.rows, limit)), len(rows.rows), skip_invalid, limit
    )


def rows_of(
    sources: Sequence[AdapterSource],
    *,
    limit: int,
    data: Path | Mapping[str, Path] | None = None,
    say: Say = lambda line: None,
) -> dict[str, TaskRows]:
    """The rows of each adapter that has any, of its own file or of one for all; for the others a
    line that says why not, where a reason can be told.
    """
    found = {}
    files = data if isinstance(data, Mapping) else {source.name: data for source in sources}
    for source in sources if limit else ():
        data = files.get(source.name)
        if not source.metadata or source.task == "masked-lm":
            if data is not None:
                why = (
                    "what masked-lm trained gives embeddings"
                    if source.metadata
                    else "an adapter of another tool does not say how it reads rows"
                )
                say(f"task {source.name}: not measured: {why}")
            continue
        try:
            rows = task_rows(source, limit=limit, data=data)
        except EdgetuneError as error:
            if data is not None:
                raise
            say(f"task {source.name}: not measured: {error}")
            continue
        if rows is not None:
            found[source.name] = rows
    return found
