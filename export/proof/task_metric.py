"""What an adapter is worth on its task: the metric of its recipe's validation rows, in torch as
trained and in the bundle.

`prove` says that the outputs agree; this says what the disagreement that rounding leaves costs
where it counts. `verdict` judges it; `edgetune export --precision auto` (`search`) compares it with
a bound of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgetune.core.errors import EdgetuneError, ExportError
from edgetune.core.progress import Say
from edgetune.core.tasks import lower_is_better
from edgetune.data.prompts import PromptFormat
from edgetune.data.rows import read_rows
from edgetune.evaluation.answers import BundleAnswers
from edgetune.evaluation.forgetting.subjects import BundleSubject
from edgetune.evaluation.forgetting.torch_subject import torch_texts
from edgetune.evaluation.measures import Evaluation, measure_rows, measure_text
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.export.inputs.sources import AdapterSource
from edgetune.export.proof.task_loss import TaskLoss, answer_of, task_loss
from edgetune.export.proof.task_rows import TaskRows, _chosen, rows_of
from edgetune.export.proof.torch_model import trained_base
from edgetune.metrics.statistics import headline
from edgetune.models.base import Base
from edgetune.models.load import load_tokenizer
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.tasks.open_bundle import OpenBundle

# Of 64 rows a loss of ten points is more than chance; an encoder reads 256 texts in a fraction of a
# second.
DEFAULT_ROWS = {"decoder": 64, "encoder": 256, "encoder-decoder": 64}
# The first of these that a task has is its metric. ROUGE-L: BLEU is 0 for answers of a word, exact
# match for free text.
METRICS = (
    "accuracy",
    "json_exact_match",
    "entity_f1",
    "micro_f1",
    "spearman",
    "recall_at_1",
    "rouge_l",
    "preference_accuracy",
    "token_accuracy",
    "perplexity",
)
# What an adapter's [generation] may shape answers by (`shaping`), each made neutral; a caller's
# form replaces an adapter's.
FREE: Mapping[str, Any] = {
    "temperature": 0.0,
    "response_format": {"type": "text"},
    "logit_bias": (),
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
T = TypeVar("T")
CALIBRATION = "expected_calibration_error"
ALONE = "(base)"  # the name of what is measured and proven of a bundle without adapters


@dataclass(frozen=True)
class Rejections:
    """Rows that an adapter's threshold leaves without a label: by torch, by the bundle, and by one
    of the two alone.
    """

    torch: int
    bundle: int
    changed: int


@dataclass(frozen=True)
class TaskResult:
    """One adapter on its task. For the manifest: `to_dict`."""

    metric: str
    higher_is_better: bool
    rows: int
    found: int
    data: str
    data_digest: str
    torch: Mapping[str, float]
    bundle: Mapping[str, float]
    # share of rows with the same answer from both; None of numbers, and of text, where nothing
    # is answered
    same: float | None
    changed: TaskLoss | None = None
    """which rows; None where there are none (perplexity)"""
    rejections: Rejections | None = None
    """None where the adapter has no threshold"""

    @property
    def points(self) -> float:
        """What the bundle loses against torch in the metric's own unit; negative a gain."""
        change = self.torch[self.metric] - self.bundle[self.metric]
        return change if self.higher_is_better else -change

    @property
    def loss(self) -> float:
        """What the bundle loses against torch, relative to torch: 0.01 is one hundredth, negative a
        gain.
        """
        return relative_loss(
            self.torch[self.metric],
            self.bundle[self.metric],
            higher_is_better=self.higher_is_better,
        )

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            **asdict(self),
            "torch": dict(self.torch),
            "bundle": dict(self.bundle),
            "loss": self.loss,
        }

    def line(self) -> str:
        """For a person."""
        same = "" if self.same is None else f"; same answer on {self.same:.1%}"
        return (
            f"{self.metric} {self.torch[self.metric]:.4f} in torch, {self.bundle[self.metric]:.4f}"
            f" in the bundle ({self.rows} of {self.found} rows of {self.data}){same}"
            f"{self._confidence()}"
        )

    def _confidence(self) -> str:
        """What rounding does to the scores."""
        line = ""
        if CALIBRATION in self.torch and CALIBRATION in self.bundle:
            line = (
                f"; calibration error {self.torch[CALIBRATION]:.3f} and"
                f" {self.bundle[CALIBRATION]:.3f}"
            )
        if self.rejections is None:
            return line
        one = self.rejections
        return f"{line}; without a label {one.torch} and {one.bundle} rows, {one.changed} changed"


def relative_loss(reference: float, value: float, *, higher_is_better: bool) -> float:
    """(reference − value) / |reference| of a metric where more is better, else its negative; a
    whole one (±1) from a reference of 0 where the value differs."""
    change = reference - value if higher_is_better else value - reference
    if not change:
        return 0.0
    return change / abs(reference) if reference else 1.0 if change > 0 else -1.0


def measure_in_torch(model: Any, base: Base, source: AdapterSource, rows: TaskRows) -> Evaluation:
    """The answers of a trained model on its rows."""
    return _measured(
        TorchAnswers(model, load_tokenizer(base), dict(source.metadata)), source.folder, rows
    )


class FreeAnswers(BundleAnswers):
    """A bundle's answers without the form and the penalties that an adapter brings: torch, its
    reference, knows none of them.
    """

    def generate(self, prompts: Sequence[Any]) -> list[str]:
        """The completion of each prompt, greedily, to the adapter's own limit and stop texts."""
        return [
            answer.text for answer in self.runtime.generate(prompts, adapter=self.adapter, **FREE)
        ]

    def generate_surely(self, prompts: Sequence[Any]) -> list[tuple[str, float | None]]:
        """The same: calibrated are the answers that a form shapes."""
        return [(text, None) for text in self.generate(prompts)]


def measure_in_bundle(runtime: Runtime, source: AdapterSource, rows: TaskRows) -> Evaluation:
    """The answers of the bundle with that adapter."""
    return _measured(FreeAnswers(runtime, source.name), runtime.folder, rows)


def _measured(answers: Any, folder: Path, rows: TaskRows) -> Evaluation:
    return measure_rows(
        answers, folder, rows.rows, skip_invalid=rows.skip_invalid, windows=rows.limit
    )


def compare_on_task(in_torch: Evaluation, in_bundle: Evaluation, rows: TaskRows) -> TaskResult:
    """Both sides of one adapter. ExportError where it has no metric that is known here."""
    metric = next((name for name in METRICS if name in in_torch.metrics), None)
    if metric is None:
        raise ExportError(
            "no task metric is known for it",
            where=in_torch.source,
            expected=f"one of {', '.join(METRICS)}",
            got=", ".join(in_torch.metrics),
        )
    answers = [
        [answer for one in side.predictions if not isinstance(answer := answer_of(one), float)]
        for side in (in_torch, in_bundle)
    ]
    same = (
        sum(a == b for a, b in zip(*answers, strict=True)) / len(answers[0]) if answers[0] else None
    )
    return TaskResult(
        metric,
        not lower_is_better(metric),
        len(rows.rows.rows),
        rows.found,
        rows.name,
        in_torch.data_digest,
        headline(in_torch.metrics),
        headline(in_bundle.metrics),
        same,
        task_loss(metric, in_torch.predictions, in_bundle.predictions, rows.rows.rows),
        _rejections(in_torch, in_bundle),
    )


def _rejections(in_torch: Evaluation, in_bundle: Evaluation) -> Rejections | None:
    if "answered" not in in_torch.metrics:
        return None
    ours, theirs = (
        [bool(one.get("rejected")) for one in side.predictions] for side in (in_torch, in_bundle)
    )
    changed = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return Rejections(sum(ours), sum(theirs), changed)


def measure_tasks(
    folder: Path,
    manifest: Manifest,
    sources: Sequence[AdapterSource],
    rows: Mapping[str, TaskRows],
    *,
    base: Base,
    trained: Callable[[AdapterSource], Any],
    threads: int | None = None,
    known: dict[str, Evaluation] | None = None,
    strict: bool = False,
    say: Say = lambda line: None,
) -> dict[str, TaskResult]:
    """Every adapter that has rows, in torch (`trained` gives its model) and through the bundle's
    engine.

    `known` keeps what torch answered, for the next bundle of the same adapters. Rows that cannot be
    used are no reason to fail an export, on neither side: a line says so; but where somebody named
    them (`strict`) the error is raised.
    """
    in_torch = {} if known is None else known

    def tried(source: AdapterSource, take: Callable[[], T]) -> T | None:
        try:
            return take()
        except EdgetuneError as error:
            if strict:
                raise
            say(f"task {source.name}: not measured: {error}")
            return None

    for source in sources:
        if source.name in rows and source.name not in in_torch:
            answered = tried(
                source,
                lambda one=source: measure_in_torch(trained(one), base, one, rows[one.name]),  # type: ignore[misc]
            )
            if answered is not None:
                in_torch[source.name] = answered
    wanted = [source for source in sources if source.name in rows and source.name in in_torch]
    if not wanted:
        return {}
    results = {}
    with Runtime(OpenBundle(folder, manifest, threads=threads)) as runtime:
        for source in wanted:
            on = rows[source.name]
            result = tried(
                source,
                lambda one=source, on=on: compare_on_task(  # type: ignore[misc]
                    in_torch[one.name], measure_in_bundle(runtime, one, on), on
                ),
            )
            if result is not None:
                results[source.name] = result
                say(f"task {source.name}: {result.line()}")
    return results


@dataclass(frozen=True)
class TaskPlan:
    """How the task metric of an export is taken."""

    rows: int | None = None
    """rows of each adapter at most; None: `DEFAULT_ROWS`; 0: nothing is measured"""
    data: Path | Mapping[str, Path] | None = None
    """the rows of every adapter, or a file for each; None: the validation rows of its recipe"""
    known: dict[str, Evaluation] | None = None
    """what torch answered, kept from bundle to bundle of the same adapters"""
    allowed_by: str = ""
    """the option that ships what lost more than the verdict allows, for the manifest; "": none"""
    keep_confidence: bool = False
    """whether temperature and threshold ship as trained, see `proof.confidence`"""

    @property
    def confidence_kept_by(self) -> str:
        """The option that leaves no rows to fit them on again; "": none."""
        if self.keep_confidence:
            return "--keep-confidence"
        return "--task-rows 0" if self.rows == 0 else ""

    def check(self) -> None:
        """DataError where `data` cannot be read, before anything takes its time."""
        for file in self.data.values() if isinstance(self.data, Mapping) else [self.data]:
            if file is not None:
                read_rows(file)

    def measure(
        self,
        folder: Path,
        manifest: Manifest,
        base: Base,
        sources: Sequence[AdapterSource],
        *,
        load: Callable[[Base, AdapterSource | None], Any],
        threads: int | None,
        say: Say,
    ) -> dict[str, TaskResult]:
        """Every adapter that has rows; of a base alone the perplexity of `data`. `load` puts a
        source's adapter on a base in torch.
        """
        limit = DEFAULT_ROWS[base.kind] if self.rows is None else self.rows
        if not sources:
            return self._base_alone(
                folder, manifest, base, limit, load=load, threads=threads, say=say
            )
        rows = rows_of(sources, limit=limit, data=self.data, say=say)

        def trained(source: AdapterSource) -> Any:
            return load(trained_base(base, source.metadata), source)

        return measure_tasks(
            folder,
            manifest,
            sources,
            rows,
            base=base,
            trained=trained,
            threads=threads,
            known=self.known,
            strict=self.data is not None,
            say=say,
        )

    def _base_alone(
        self,
        folder: Path,
        manifest: Manifest,
        base: Base,
        limit: int,
        *,
        load: Callable[[Base, AdapterSource | None], Any],
        threads: int | None,
        say: Say,
    ) -> dict[str, TaskResult]:
        if not isinstance(self.data, Path) or not limit:
            return {}
        rows = _chosen(read_rows(self.data), limit, skip_invalid=False)
        known = {} if self.known is None else self.known
        if ALONE not in known:
            known[ALONE] = _perplexity(
                torch_texts(load(base, None), load_tokenizer(base)), base.folder, rows
            )
        with Runtime(OpenBundle(folder, manifest, threads=threads)) as runtime:
            result = compare_on_task(
                known[ALONE], _perplexity(BundleSubject(runtime, None), folder, rows), rows
            )
        say(f"task {ALONE}: {result.line()}")
        return {ALONE: result}


def _perplexity(subject: Any, folder: Path, rows: TaskRows) -> Evaluation:
    return measure_text(subject, folder, rows.rows, PromptFormat(), windows=rows.limit)
