"""Many recipes trained by tasks of Ray: each on processors of its own, and one whose worker dies
goes on from its checkpoint in another one.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from edgetune.bulk.ray_cluster import HERE, RETRIES, connected
from edgetune.core.errors import InputError, TrainingError
from edgetune.core.progress import Progress
from edgetune.recipe.runs import PlannedRun, check_independent
from edgetune.training.many import TrainedRun, train_one
from edgetune.training.run import WriteMore


def train_by_ray(
    runs: Sequence[PlannedRun],
    *,
    address: str = HERE,
    workers: int | None = None,
    progress: Progress | None = None,
    write_more: WriteMore | None = None,
    replace_others: bool = False,
) -> Iterator[TrainedRun]:
    """Train runs as tasks of Ray; what came of each, in the order of finishing.

    A task has as many processors as its recipe has `threads` (1 where it says nothing), and a GPU
    where its `device` is "cuda". `workers`: at most so many at a time. Recipes' files and folders
    must lie at the same paths on every machine. What stops one run is its outcome. RecipeError
    where a run begins with what another one trains; InputError where Ray is missing, cannot be
    reached, or has no machine that is large enough. The other arguments are those of `train_one`.
    Runs that are under way when the iteration ends are stopped, and can go on later.
    """
    if not runs:
        return
    check_independent(runs)
    ray = connected(address)
    _check_machines(ray, runs)
    task = ray.remote(max_retries=RETRIES)(_train)
    waiting, under_way, said = deque(runs), dict[Any, PlannedRun](), progress or Progress()
    processors = int(ray.cluster_resources().get("CPU", 0))
    said.say(f"{len(runs)} runs on {processors} processors")
    try:
        while waiting or under_way:
            while waiting and len(under_way) < (workers or len(runs)):
                run = waiting.popleft()
                run = replace(run, out=run.out.absolute())  # workers have other working folders
                sized = task.options(name=run.name, **_needs(run))
                under_way[sized.remote(run, write_more, replace_others)] = run
            (first, *_), _ = ray.wait(list(under_way), num_returns=1)
            run = under_way.pop(first)
            done = _outcome(ray, first, run)
            number = len(runs) - len(waiting) - len(under_way)
            there = "finished before: " if done.was_there else ""
            said.say(f"{number}/{len(runs)} {run.name}  {there}{done.line}")
            yield done
    finally:
        for reference in under_way:
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)


def _train(run: PlannedRun, write_more: WriteMore | None, replace_others: bool) -> TrainedRun:
    """In a worker: train in as many threads as it has processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(_threads(run))
    try:
        return train_one(
            run, progress=Progress(io.StringIO()), write_more=write_more, replace=replace_others
        )
    finally:
        torch.set_num_threads(threads)


def _outcome(ray: Any, reference: Any, run: PlannedRun) -> TrainedRun:
    """What a task came to, also where its processes died each time."""
    try:
        done: TrainedRun = ray.get(reference)
        return done
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        raised = isinstance(error, ray.exceptions.RayTaskError)  # a traceback, its reason last
        what = "its worker cannot train" if raised else f"its worker died, {RETRIES + 1} times"
        return TrainedRun(
            run,
            None,
            TrainingError(
                what,
                got=f"{type(error).__name__}: {lines[-1 if raised else 0]}"[:300],
                fix="What it had done is kept; give the command again to go on.",
            ),
        )


def _threads(run: PlannedRun) -> int:
    return run.recipe.threads or 1


def _needs(run: PlannedRun) -> dict[str, int]:
    """Processors and GPUs of a task."""
    return {"num_cpus": _threads(run), "num_gpus": int(run.recipe.device == "cuda")}


def _check_machines(ray: Any, runs: Sequence[PlannedRun]) -> None:
    """A task that fits no machine would wait for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        most = int(max((each.get(resource, 0) for each in machines), default=0))
        largest = max(runs, key=lambda run: _needs(run)[key])
        if (wanted := _needs(largest)[key]) > most:
            raise InputError(
                f"no machine of the cluster has enough {resource}s for {largest.name}",
                expected=f"at most {most}",
                got=f"{wanted}",
                fix=f"Set --set threads={most}." if resource == "CPU" else "Set --set device=cpu.",
            )
