"""A bundle as a function from rows to answered rows, which travels to workers and opens there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.core.errors import EdgetuneError
from edgetune.runtime.tasks.prediction_file import Request, answer_rows, requests_of
from edgetune.runtime.tasks.runtime import Runtime

ERROR = "error"
"""The field of a row that could not be answered: why."""


class Answerer:
    """Answers rows as `edgetune predict --input` does; a row that cannot be answered gains `error`.

    It may be pickled: the bundle is opened in the process that answers, at its first row, and must
    lie at the same path there. `adapter` serves rows without an `adapter` of their own, a name or
    a folder; `threads`: of one process; `settings`: those of `Runtime.generate`.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        adapter: str | None = None,
        threads: int | None = 1,
        truncate: bool = False,
        threshold: float | None = None,
        engine: str = "auto",
        providers: Sequence[str] = (),
        verify: bool = True,
        signed_by: str | Path | None = None,
        **settings: Any,
    ) -> None:
        self.bundle, self.adapter = str(bundle), adapter
        self.truncate, self.threshold, self.settings = truncate, threshold, settings
        self._opening: dict[str, Any] = {
            "threads": threads,
            "engine": engine,
            "providers": providers,
            "verify": verify,
            "signed_by": signed_by,
        }
        self._runtime: Runtime | None = None
        self.loaded: Path | None = None
        """the folder that the adapter came out of, once the bundle is open"""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runtime": None}

    @property
    def runtime(self) -> Runtime:
        """The open bundle. BundleError, AdapterError: it, or the adapter's folder, is no good."""
        if self._runtime is None:
            runtime = Runtime.open(self.bundle, **self._opening)
            name = self.adapter
            if name is not None and name not in runtime.adapters and Path(name).is_dir():
                self.loaded = Path(name).resolve()
                runtime.load_adapter(self.loaded.name, name)
                self.adapter = str(self.loaded)  # workers may have other working folders
            self._runtime = runtime
        return self._runtime

    @property
    def adapter_name(self) -> str | None:
        """The adapter by the name that it has in the open bundle."""
        if self.adapter is None or self.adapter in self.runtime.adapters:
            return self.adapter
        folder = Path(self.adapter)
        return folder.resolve().name if folder.is_dir() else self.adapter

    def rows(
        self, rows: Iterable[Mapping[str, Any]], *, source: str = "rows", first: int = 1
    ) -> list[dict[str, Any]]:
        """The rows with their answers, in their order. `source` and `first` say in errors where a
        row is from: a file, and the number of the first row.
        """
        return self.answered(rows, source=source, first=first)[0]

    def answered(
        self, rows: Iterable[Mapping[str, Any]], *, source: str = "rows", first: int = 1
    ) -> tuple[list[dict[str, Any]], dict[int, str]]:
        """As `rows`, and beside them why those at some places (from 0) could not be answered: an
        `error` of a row's own says nothing of its answer.
        """
        runtime, name = (
            self.runtime,
            self.adapter_name,
        )  # what is wrong with these is no row's fault
        given = [{key: plain(value) for key, value in row.items()} for row in rows]
        answered: list[dict[str, Any]] = [dict(row) for row in given]
        requests: dict[int, Request] = {}
        failed: dict[int, str] = {}
        for at, row in enumerate(given):
            try:
                (requests[at],) = requests_of(
                    runtime,
                    [(first + at, row)],
                    path=source,
                    adapter=name,
                    truncate=self.truncate,
                )
            except EdgetuneError as error:
                failed[at] = str(error)
        places = list(requests)
        try:
            for index, row in self._answer([requests[at] for at in places]):
                answered[places[index]] = row
        except EdgetuneError:  # one of them: each by itself
            for at in places:
                try:
                    ((_, answered[at]),) = self._answer([requests[at]])
                except EdgetuneError as error:
                    failed[at] = str(error)
        for at, why in failed.items():
            answered[at][ERROR] = why
        return answered, failed

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Columns in, columns out: what `map_batches` of Ray Data gives and takes."""
        names = list(batch)
        rows = [
            dict(zip(names, values, strict=True))
            for values in zip(*(batch[name] for name in names), strict=True)
        ]
        answered = self.rows(rows)
        columns = dict.fromkeys([*names, *(name for row in answered for name in row)])
        return {name: [row.get(name) for row in answered] for name in columns}

    def _answer(self, requests: Sequence[Request]) -> Iterable[tuple[int, dict[str, Any]]]:
        return answer_rows(
            self.runtime,
            requests,
            truncate=self.truncate,
            threshold=self.threshold,
            **self.settings,
        )


def plain(value: Any) -> Any:
    """A value as JSON has it: arrays and numbers of numpy are lists and Python's own."""
    if isinstance(value, np.ndarray):
        return [plain(one) for one in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value
