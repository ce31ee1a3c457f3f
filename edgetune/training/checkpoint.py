"""Checkpoints of an unfinished run: everything that the rest of the training depends on, in one
file.

They lie in RUN/checkpoints beside the journal in progress; an older run in RUN stays whole until
the new one takes its place. A file appears under its name only when it is complete, so a process
may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from edgetune.core.errors import DataError, EdgetuneError, OutputError, RecipeError, TrainingError
from edgetune.core.exclusive import exclusive
from edgetune.core.files import PARTIAL, output_errors, whole_file
from edgetune.core.layout import ADAPTER, ADAPTERS, CHECKPOINTS, TRIALS
from edgetune.core.progress import Say
from edgetune.core.settings import flat, toml_value
from edgetune.recipe.migrate import MOVED, new_place
from edgetune.recipe.schema import Recipe
from edgetune.training.learner import Learned

SCHEMA = 2
OWN_TABLES = {table for table, _ in MOVED.values()}  # of a stage: those of one method each
NAME = re.compile(r"stage-(\d+)-step-(\d+)\.pt")
# What a run may differ in and still be the same: where it is written, and files, which are compared
# by their digests.
NOT_COMPARED = re.compile(
    r"out|base|parameters\.start|checkpoint_every|keep_checkpoints|stage\.\d+\.(data\.(train|validation)|replay\.data)"
)


@dataclass
class Position:
    """How far a stage has come."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)  # losses since the last line of the journal
    recent_facts: list[dict[str, float]] = field(
        default_factory=list
    )  # what the steps since then measured besides
    final_loss: float = float("nan")  # mean over the last logged steps

    def add(
        self,
        learned: Learned,
        replayed: Learned | None,
        facts: Mapping[str, float],
        *,
        seconds: float,
    ) -> None:
        """One more step."""
        self.step, self.seconds = self.step + 1, self.seconds + seconds
        for each in (learned, replayed):
            if each is not None:
                self.tokens, self.padded_tokens = (
                    self.tokens + each.tokens,
                    self.padded_tokens + each.padded_tokens,
                )
        self.recent.append(learned.loss)
        if facts:
            self.recent_facts.append(dict(facts))

    def means_of_recent(self) -> dict[str, float]:
        """The steps since the last line of the journal make one more: their loss is `final_loss`,
        their facts are returned.
        """
        self.final_loss, self.recent = sum(self.recent) / len(self.recent), []
        facts, self.recent_facts = self.recent_facts, []
        return (
            {name: sum(fact[name] for fact in facts) / len(facts) for name in facts[0]}
            if facts
            else {}
        )


@dataclass(frozen=True)
class State:
    """What a checkpoint holds; tensors are on the CPU."""

    origin: dict[str, str]  # what the run is made from, see `origin_of`
    stage: int
    position: Position
    finished: list[dict[str, Any]]  # results of the stages before
    precisions: list[str]  # of every stage, "auto" resolved
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: list[dict[str, Any]]  # of every process
    reference: dict[str, Tensor]  # of the stage, from before its first step; see Prepared
    samples: list[
        Any
    ]  # of every process: what the next step learns from, where it was made before; see Experience
    journal: list[dict[str, Any]]
    seconds: float  # since the run began, loading and measuring included
    batch_sizes: list[int] | None = None  # of every stage, "auto" measured
    watched: dict[str, Any] | None = None  # of the stage's validations; see `keeping.Keeping`


def origin_of(
    recipe: Recipe,
    *,
    base: str,
    data: Sequence[Mapping[str, str]],
    processes: int,
    rounding: int | None = None,
) -> dict[str, str]:
    """Everything that a resumed run must have in common with the one it continues, as texts to
    compare and to show.
    """
    origin = {key: _shown(value) for key, value in flat(recipe) if not NOT_COMPARED.fullmatch(key)}
    origin["base"] = base
    if rounding is not None:
        origin["rounding of the base"] = str(rounding)
    for index, digests in enumerate(data):
        origin |= {f"stage.{index}.data.{name}": digest for name, digest in digests.items()}
    return origin | {"processes": str(processes)}


def in_own_tables(origin: Mapping[str, str]) -> dict[str, str]:
    """An origin with the settings that only one method has where they lie now: version 0.1 had them
    among those of every stage, whatever its method.
    """
    placed = {}
    for key, value in origin.items():
        stage, _, name = key.rpartition(".")
        method, new = origin.get(f"{stage}.method"), new_place(key)
        if new is not None and method == toml_value(MOVED[name][0]):
            placed[new] = value
        elif new is None and not (method is not None and name in OWN_TABLES):  # that is "not set"
            placed[key] = value
    return placed


# Settings that came later: a run that began before had none, and goes on with what they are now.
ADDED = re.compile(r"stage\.\d+\.(keep|patience|class_weights)")


def check_origin(found: Mapping[str, str], wanted: Mapping[str, str], *, where: Path) -> None:
    """Raise one line that names what differs between the unfinished run and what shall
    continue it.
    """
    found, wanted = in_own_tables(found), in_own_tables(wanted)
    keys = [
        key
        for key in dict.fromkeys([*wanted, *found])
        if found.get(key) != wanted.get(key) and not (key not in found and ADDED.fullmatch(key))
    ]
    if not keys:
        return
    by_digest = [
        key
        for key in keys
        if key == "base"
        or re.fullmatch(r"stage\.\d+\.data\.(train|validation|replay|start|reward .*)", key)
    ]
    kind = DataError if len(by_digest) == len(keys) and "base" not in keys else RecipeError
    more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""

    def listed(origin: Mapping[str, str]) -> str:
        return ", ".join(f"{key} = {_short(origin.get(key, 'not set'))}" for key in keys[:3]) + more

    raise kind(
        f"--resume needs the {'data' if kind is DataError else 'recipe'} that the run began with",
        where=str(where),
        expected=listed(found),
        got=listed(wanted),
        fix="Without --resume a new run begins and takes its place.",
    )


class Checkpoints:
    """The checkpoints in a folder; `latest` is the newest that this run wrote or continued from."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.latest: Path | None = None
        self.older = self.found()  # of an unfinished run before this one

    def found(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        named = [path for path in self.folder.iterdir() if NAME.fullmatch(path.name)]
        return sorted(named, key=lambda path: _place(path))

    @property
    def anything(self) -> bool:
        """Whether there is something to go on from."""
        return bool(self.found()) or self.has_judges or (self.folder / TRIALS).is_file()

    @property
    def has_judges(self) -> bool:
        """Whether a judge of this run is trained already, or partly."""
        judges = judges_in(self.folder)
        return any(judges.glob(f"*/{ADAPTER}")) or any(judges.glob(f"*/{CHECKPOINTS}/*.pt"))

    def load(self, origin: Mapping[str, str], *, say: Say) -> State | None:
        """The newest checkpoint that can be read, None when there is none. Raises where it is of
        another run.
        """
        for path in reversed(self.older):
            state = _read(path)
            if state is None:
                say(f"{path} is damaged; an older checkpoint is tried")
                continue
            check_origin(state.origin, origin, where=self.folder.parent)
            self.latest, self.older = (
                path,
                [other for other in self.older if _place(other) > _place(path)],
            )
            return state
        return None

    def write(self, state: State) -> None:
        """Write one more, whole, and remove what is not to be kept."""
        path = self.folder / f"stage-{state.stage}-step-{state.position.step:08d}.pt"
        content = {name: getattr(state, name) for name in State.__dataclass_fields__}
        with whole_file(path) as partial, partial.open("wb") as file:
            _save({"schema": SCHEMA, **content, "position": asdict(state.position)}, file)
            file.flush()
            os.fsync(file.fileno())
        self.latest = path
        for old in [p for p in self.older if p != path]:
            old.unlink(missing_ok=True)
        self.older = []
        for old in self.found()[: -self.keep]:
            old.unlink(missing_ok=True)

    @property
    def kept(self) -> str:
        """A sentence about the newest checkpoint, empty when there is none."""
        if self.latest is None:
            return ""
        stage, step = _place(self.latest)
        return (
            f"The checkpoint of stage {stage}, step {step} is kept in {self.folder}; train --resume"
            " continues from it."
        )


def judges_in(work: Path) -> Path:
    """Where the judges of an unfinished run are, each a run of its own."""
    return work / ADAPTERS


@contextlib.contextmanager
def unfinished(run: Path, *, keep: int, say: Say) -> Iterator[Checkpoints]:
    """RUN/checkpoints while a run is under way, which no other process may write meanwhile. When it
    stops with an error, the folder stays if a checkpoint is in it, and the error says so; else
    nothing is left behind."""
    run = run.resolve()
    with exclusive(run):
        yield from _unfinished(run, keep=keep, say=say)


def _unfinished(run: Path, *, keep: int, say: Say) -> Iterator[Checkpoints]:
    work, was_there = run / CHECKPOINTS, run.exists()
    with output_errors(run, work):
        work.mkdir(parents=True, exist_ok=True)
        for path in work.glob(f"{PARTIAL}*"):
            path.unlink()
    checkpoints = Checkpoints(work, keep=keep)
    try:
        with output_errors(run, work):
            yield checkpoints
    except (TrainingError, OutputError) as error:
        if not checkpoints.kept:
            raise
        fix = f"{error.fix if isinstance(error, TrainingError) else ''} {checkpoints.kept}".strip()
        raise type(error)(
            error.what, where=error.where, expected=error.expected, got=error.got, fix=fix
        ) from error
    except EdgetuneError:
        raise
    except BaseException:
        if checkpoints.kept:
            say(checkpoints.kept)
        raise
    finally:
        if work.is_dir() and not checkpoints.anything:
            shutil.rmtree(work)
            if not was_there:
                run.rmdir()


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The weights that learn, by name, on the CPU."""
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's weights into a model that was built by the same recipe."""
    places = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if {name: p.shape for name, p in places.items()} != {
        name: w.shape for name, w in weights.items()
    }:
        raise TrainingError(
            "the checkpoint does not fit the model that this recipe builds now",
            expected=f"{len(places)} tensors",
            got=f"{len(weights)}, or others",
            fix="It was written by another version; train without --resume.",
        )
    with torch.no_grad():
        for name, parameter in places.items():
            parameter.copy_(weights[name])


class _Watched:
    """A file that remembers why a write failed: torch's zip writer says nothing but that it did."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.failure: OSError | None = None

    def write(self, block: Any) -> int:
        try:
            return self.file.write(block)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(content: Mapping[str, Any], file: IO[bytes]) -> None:
    """`torch.save`, whose RuntimeError on a full disk becomes the OSError behind it."""
    watched: Any = _Watched(file)
    try:
        torch.save(content, cast(IO[bytes], watched))
    except RuntimeError as error:
        if watched.failure is None:
            raise
        raise watched.failure from error


def _read(path: Path) -> State | None:
    """None for a file that is damaged or of another schema."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
        return None
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
        return None
    return State(**{**content, "position": Position(**content["position"])})


def _place(path: Path) -> tuple[int, int]:
    """(stage, step) from a checkpoint's name."""
    stage, step = path.stem.removeprefix("stage-").split("-step-")
    return int(stage), int(step)


def _shown(value: Any) -> str:
    return "not set" if value is None else toml_value(value)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:24]}…"
