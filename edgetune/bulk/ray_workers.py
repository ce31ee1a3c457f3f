"""Parts answered by workers of Ray: each holds the open bundle, and a part whose worker dies is
answered again by another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgetune.bulk.answers import Answerer
from edgetune.bulk.parts import Done, Job, RowRange, answer_part, as_row
from edgetune.bulk.ray_cluster import HERE, RETRIES, connected
from edgetune.core.errors import EdgetuneError, InputError


class PartWorker:
    """One process of the pool."""

    def __init__(self, answers: Answerer, output: str) -> None:
        self.answers, self.output = answers, output

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Answer the parts of a batch (one); numbers, rows and errors of each."""
        numbers, rows, errors, said = [], [], [], []
        columns = (batch[key] for key in ("number", "source", "first", "end", "digest"))
        for number, source, first, end, digest in zip(*columns, strict=True):
            part = RowRange(int(number), str(source), int(first), int(end), str(digest))
            line = ""
            try:
                done = answer_part(self.answers, part, self.output)
            except EdgetuneError as error:  # Ray would show it with a traceback of its own
                done, line = Done(part.number, 0, 0), str(error)
            numbers.append(done.number)
            rows.append(done.rows)
            errors.append(done.errors)
            said.append(line)
        return {"number": numbers, "rows": rows, "errors": errors, "said": said}


def answer_by_ray(
    answers: Answerer,
    job: Job,
    parts: Sequence[RowRange],
    *,
    address: str = HERE,
    workers: int | None = None,
    threads: int = 1,
) -> Iterator[Done]:
    """Answer parts by a pool of workers, in the order of finishing. `workers`: None takes as many
    as the cluster has processors for. InputError where Ray is missing or cannot be reached, and
    what a worker raised.
    """
    ray = connected(address, needs="ray.data")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    most = int(ray.cluster_resources().get("CPU", 1)) // threads
    pool = min(workers or max(most, 1), len(parts))
    if pool > max(most, 1):
        raise InputError(
            "the cluster has too few processors",
            expected=f"{pool} workers of {threads} threads",
            got=f"{most * threads} processors",
            fix=f"Set --workers {max(most, 1)}.",
        )
    done = ray.data.from_items(
        [as_row(part) for part in parts], override_num_blocks=len(parts)
    ).map_batches(
        PartWorker,
        fn_constructor_args=(answers, job.output),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=pool),
        num_cpus=threads,
        max_restarts=-1,
        max_task_retries=RETRIES,
    )
    for row in _rows(done):
        if row["said"]:
            raise InputError(row["said"])
        yield Done(row["number"], row["rows"], row["errors"])


def _rows(done: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set; InputError with the line that says why it failed."""
    try:
        yield from done.iter_rows()
    except Exception as error:  # whatever a worker raised, in classes of Ray's
        said = re.findall(r"^\s*(\w+(?:Error|Exception): .+)$", str(error), re.MULTILINE)
        raise InputError(
            "the workers of Ray stopped",
            got=(said or [f"{type(error).__name__}: {error}"])[0][:300],
            fix="What is answered stays; give the command again to go on.",
        ) from error
