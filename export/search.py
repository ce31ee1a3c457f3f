"""`--precision auto`: the smallest bundle whose task metric stays within a bound of torch in fp32,
measured through the real engine.

Precisions are exported in the order of their estimated size, each proven and measured like any
bundle, until one holds; fp32 goes first, as what the others are seen against. Where 4 bits rounded
to the nearest come near the bound, the same size is tried again with weights rounded carefully. The
winner is moved to its place as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgetune.core.errors import EdgetuneError, ExportError, ProofError
from edgetune.core.exclusive import exclusive
from edgetune.core.files import scratch_folder, whole_folder, write_json
from edgetune.core.layout import MANIFEST
from edgetune.core.progress import Say
from edgetune.core.tasks import lower_is_better
from edgetune.export.bundle import check_place, export_bundle
from edgetune.export.candidates import Candidate, candidates
from edgetune.export.graph.seq2seq_files import check_seq2seq
from edgetune.export.graph.trace import Traced
from edgetune.export.inputs.calibration_text import check_quantiser, has_recipe
from edgetune.export.inputs.sources import AdapterSource, base_of, check_sources, read_source
from edgetune.export.proof.cost import CostPlan
from edgetune.export.proof.probe import probe_rows
from edgetune.export.proof.task_metric import TaskPlan
from edgetune.export.proof.task_rows import rows_of
from edgetune.export.proof.torch_model import torch_model
from edgetune.models.base import Base
from edgetune.models.load import load_tokenizer
from edgetune.quantisation.precision import Precision
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.check.latency import Workload
from edgetune.runtime.check.rounds import Latency, side_by_side

AUTO_ROWS = {"decoder": 64, "encoder": 1000, "encoder-decoder": 64}
WITHIN_REACH = 8
"""times the bound: what more than that is lost by rounding to nearest, gptq does not bring back (it
left a quarter of the loss on SmolLM2)
"""
RUNS, ROUNDS, PROMPT, ANSWER = 4, 2, 64, 24  # of the latency of every bundle tried


@dataclass(frozen=True)
class Trial:
    """One precision that was tried. `loss`: the largest of any adapter, relative to torch; None
    where the proof failed.
    """

    name: str
    metrics: Mapping[str, float]  # adapter → its task metric in the bundle
    loss: float | None = None
    mb: float | None = None
    latency: Latency | None = None
    failed: str = ""
    cost: Mapping[str, Any] | None = None
    """the base's own metric, see `edgetune.export.proof.cost`"""

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """What a search found: every trial (fp32 first, then by size), and which of them ships."""

    manifest: Manifest
    trials: tuple[Trial, ...]
    chosen: int
    max_loss: float
    metric: Mapping[str, str]  # adapter → the name of its metric
    reference: Mapping[str, float]  # adapter → that metric in torch
    rows: int

    @property
    def front(self) -> frozenset[int]:
        """Trials that no other beats in size, time and loss at once."""

        def place(trial: Trial) -> tuple[float, float, float] | None:
            if trial.loss is None or trial.mb is None or trial.latency is None:
                return None
            return trial.mb, trial.latency.step_ms, trial.loss

        places = [place(trial) for trial in self.trials]
        known = [one for one in places if one is not None]

        def beaten(own: tuple[float, float, float]) -> bool:
            return any(
                other != own and all(x <= y for x, y in zip(other, own, strict=True))
                for other in known
            )

        return frozenset(at for at, own in enumerate(places) if own is not None and not beaten(own))


def export_smallest(
    adapters: Sequence[tuple[str, Path]],
    out: Path,
    *,
    max_loss: float,
    mode: str = "separate",
    keep: Mapping[str, str] | None = None,
    base_name: str | None = None,
    task: TaskPlan | None = None,
    threads: int | None = None,
    say: Say = lambda line: None,
    cost: CostPlan | None = None,
    quantiser: str | None = None,
    calibration: Path | None = None,
    context: int | None = None,
    replace_finished: bool = True,
    adapter_precision: str = "fp32",
) -> Found:
    """Write the smallest bundle to `out` that loses at most `max_loss` (a share) of every adapter's
    task metric.

    `quantiser`: how 4-bit weights are rounded; not given: to nearest, and where that nearly
    suffices by gptq too, or by hqq where there is no text for it. `calibration`: text for gptq; not
    given: the training rows of the runs. ExportError where there are no rows to measure on, or
    where not even fp32 keeps within the bound.
    """
    check_place(out, finished=replace_finished, say=say)
    sources = [read_source(name, Path(folder)) for name, folder in adapters]
    mode = "merged" if len(sources) == 1 and sources[0].is_model else mode
    check_sources(sources, mode, Precision(), base_name)
    base = base_of(sources, base_name)
    quantisers = _quantisers(quantiser, base, sources, mode, calibration)
    plan = replace(
        _plan(task or TaskPlan(), base, sources), allowed_by=f"--max-loss {max_loss:.2%}"
    )
    with exclusive(out), scratch_folder(out) as work:
        search = _Search(
            adapters,
            work,
            mode,
            base_name,
            plan,
            threads,
            say,
            None if cost is None else replace(cost, known={}),
            calibration,
            context,
            adapter_precision,
        )
        first = search.tried(Candidate(Precision("fp32", overrides=dict(keep or {})), 0.0))
        if first.failed:
            raise ProofError(first.failed, where=str(out))
        _say_resolution(first, search, max_loss, say)
        chosen = 0
        for candidate in _candidates(
            base, sources, keep or {}, quantisers, merged=mode == "merged"
        ):
            if len(quantisers) > 1 and not search.within_reach(candidate, max_loss):
                continue
            trial = search.tried(candidate)
            if trial.loss is not None and trial.loss <= max_loss:
                chosen = len(search.trials) - 1
                break
        else:
            if first.loss is None or first.loss > max_loss:
                least = min(trial.loss for trial in search.trials if trial.loss is not None)
                raise ExportError(
                    f"no precision keeps within --max-loss {max_loss:.2%} of torch",
                    where=str(out),
                    got=f"{least:.2%} at best",
                    fix="Give a larger --max-loss, or more --task-rows.",
                )
        return search.finish(chosen, out, max_loss)


def _plan(task: TaskPlan, base: Base, sources: Sequence[AdapterSource]) -> TaskPlan:
    """What to measure on; ExportError where an adapter has no rows."""
    limit = AUTO_ROWS[base.kind] if task.rows is None else task.rows
    complaints: list[str] = []
    there = rows_of(sources, limit=limit, data=task.data, say=complaints.append)
    without = [source.name for source in sources if source.name not in there]
    if without or not limit or (not sources and task.data is None):
        raise ExportError(
            "--precision auto has no validation rows to measure"
            f" {', '.join(without) or 'the base'} on"
            + "".join(f" ({line})" for line in complaints),
            expected="a run whose recipe has data.validation or data.hold_out",
            fix="Give --task-data FILE, or a fixed --precision.",
        )
    return replace(task, rows=limit, known={})


def _quantisers(
    asked: str | None,
    base: Base,
    sources: Sequence[AdapterSource],
    mode: str,
    calibration: Path | None,
) -> tuple[str, ...]:
    """How 4-bit weights are rounded: what was asked for, else to nearest and then more
    carefully.
    """
    if asked is None:
        reads_text = mode == "separate" and base.kind != "encoder-decoder"
        if calibration is not None and not reads_text:
            raise ExportError(
                "only gptq reads text, and it does not round this base",
                where="--calibration",
                got=f"a {base.kind}, {mode}",
                fix="Leave it out.",
            )
        return "rtn", (
            "gptq" if reads_text and (calibration is not None or has_recipe(sources)) else "hqq"
        )
    for_any = Precision("int4", quantiser=asked)
    check_quantiser(for_any, mode=mode, calibration=calibration, swaps=True)
    if base.kind == "encoder-decoder":
        check_seq2seq(for_any)
    return (asked,)


def _candidates(
    base: Base,
    sources: Sequence[AdapterSource],
    keep: Mapping[str, str],
    quantisers: Sequence[str],
    *,
    merged: bool,
) -> list[Candidate]:
    source = sources[0] if sources else None
    rows = probe_rows(base.folder if source is None else source.folder, load_tokenizer(base), base)
    return candidates(
        torch_model(base, source),
        rows,
        keep=keep,
        decoder=base.kind != "encoder",
        quantisers=quantisers,
        merged=merged,
    )


def _say_resolution(first: Trial, search: _Search, max_loss: float, say: Say) -> None:
    """A line where the bound is finer than one answer."""
    for name, metric in search.metric.items():
        if (
            not lower_is_better(metric)
            and metric not in ("rouge_l", "spearman")
            and search.reference[name]
            and 1 / search.rows / search.reference[name] > max_loss
        ):
            say(
                f"task {name}: one answer of {search.rows} rows is"
                f" {1 / search.rows / search.reference[name]:.2%} of {metric}: --max-loss"
                f" {max_loss:.2%} lets none go; more --task-rows are finer"
            )


class _Search:
    """Exports candidates side by side into a folder, and keeps what was found of each."""

    def __init__(
        self,
        adapters: Sequence[tuple[str, Path]],
        folder: Path,
        mode: str,
        base_name: str | None,
        plan: TaskPlan,
        threads: int | None,
        say: Say,
        cost: CostPlan | None = None,
        calibration: Path | None = None,
        context: int | None = None,
        adapter_precision: str = "fp32",
    ) -> None:
        self.calibration, self.context = calibration, context
        self.adapter_precision = adapter_precision
        self.adapters, self.folder, self.mode, self.base_name = adapters, folder, mode, base_name
        self.plan, self.threads, self.say, self.cost, self.traced = (
            plan,
            threads,
            say,
            cost,
            Traced(),
        )
        self.trials: list[Trial] = []
        self.by_precision: dict[str, Trial] = {}
        self.manifests: dict[int, Manifest] = {}
        self.metric: dict[str, str] = {}
        self.reference: dict[str, float] = {}
        self.rows = 0

    def within_reach(self, candidate: Candidate, max_loss: float) -> bool:
        """Whether rounding more carefully may keep within the bound, seen from what rounding to
        nearest lost.
        """
        plain = self.by_precision.get(
            replace(candidate, precision=replace(candidate.precision, quantiser="rtn")).name
        )
        return (
            not candidate.careful
            or plain is None
            or plain.loss is None
            or plain.loss <= WITHIN_REACH * max_loss
        )

    def tried(self, candidate: Candidate) -> Trial:
        """Export one candidate, prove and measure it."""
        self.say(f"trying {candidate.name}")
        at = len(self.trials)
        try:
            manifest = export_bundle(
                self.adapters,
                self.folder / str(at),
                mode=self.mode,
                precision=candidate.precision,
                base_name=self.base_name,
                threads=self.threads,
                say=self.say,
                task=self.plan,
                traced=self.traced,
                cost=self.cost,
                context=self.context,
                adapter_precision=self.adapter_precision,
                calibration=self.calibration if candidate.precision.quantiser == "gptq" else None,
            )
            trial = self._measured(candidate.name, manifest)
            self.manifests[at] = manifest
        except ProofError as error:
            trial = Trial(candidate.name, {}, failed=error.what)
            self.say(f"  {error.what}")
        self.trials.append(trial)
        self.by_precision[candidate.name] = trial
        return trial

    def _measured(self, name: str, manifest: Manifest) -> Trial:
        results = manifest.proof["task"]
        if missing := sorted({adapter for adapter, _ in self.adapters} - set(results)):
            raise ExportError(
                f"the task metric of {', '.join(missing)} could not be taken",
                fix="See the line above, or give a fixed --precision.",
            )
        losses = []
        for adapter, one in results.items():
            self.metric[adapter], self.reference[adapter], self.rows = (
                one["metric"],
                one["torch"][one["metric"]],
                one["rows"],
            )
            losses.append(one["loss"])
        size = sum(info.bytes for info in manifest.files.values()) / 1e6
        metrics = {adapter: one["bundle"][one["metric"]] for adapter, one in results.items()}
        return Trial(name, metrics, max(losses), size, cost=manifest.quality.get("cost"))

    def finish(self, chosen: int, out: Path, max_loss: float) -> Found:
        """Time every bundle that was written, and move the chosen one to its place."""
        names = tuple(name for name, _ in self.adapters)[:1]
        workloads = {
            str(at): Workload(str(self.folder / str(at)), names, self.threads, RUNS, PROMPT, ANSWER)
            for at in self.manifests
        }
        try:
            times = side_by_side(workloads, rounds=ROUNDS)
        except EdgetuneError as error:
            self.say(f"latency could not be measured: {error}")
            times = {}
        trials = tuple(
            replace(trial, latency=times.get(str(at))) for at, trial in enumerate(self.trials)
        )
        document = {
            "max_loss": max_loss,
            "chosen": chosen,
            "tried": [trial.to_dict() for trial in trials],
        }
        manifest = replace(
            self.manifests[chosen], quality={**self.manifests[chosen].quality, "auto": document}
        )
        write_json(self.folder / str(chosen) / MANIFEST, manifest.to_dict())
        with whole_folder(out) as final:
            final.rmdir()
            (self.folder / str(chosen)).replace(final)
        return Found(manifest, trials, chosen, max_loss, self.metric, self.reference, self.rows)
