"""Trainings and exports that SIGKILL ends at random moments: what is there afterwards is whole, and
the next call ends with the same bytes as one that nobody killed.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from export_helpers import make_adapter
from fuzz.figures import ROUNDS, SEED, Figures
from process_helpers import CONTEXT
from resume_helpers import WEIGHTS
from training_helpers import intent_recipe, sft_recipe

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import sha256_file
from edgetune.recipe.read import recipe_to_toml
from edgetune.recipe.schema import Recipe
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import read_manifest

KILLS = max(3, ROUNDS // 40)
"""of trainings, and as many of exports"""
LONG_S = 600
CONTEXT.set_forkserver_preload(["edgetune.training", "edgetune.export.bundle", "edgetune.cli"])


def command_line(arguments: list[str], log: Path) -> None:
    """`edgetune …` in a process of its own."""
    from edgetune.cli import main

    with log.open("w") as sys.stdout:
        sys.stderr = sys.stdout
        main(arguments)


@dataclass(frozen=True)
class Command:
    """`edgetune …` with one folder as its result, and how long it takes."""

    arguments: Callable[[Path], list[str]]
    digests: Callable[[Path], Any]
    log: Path

    def run(self, out: Path, *more: str, kill_after_s: float | None = None) -> int:
        """Its exit code; negative where it was killed."""
        process = CONTEXT.Process(
            target=command_line, args=([*self.arguments(out), *more], self.log)
        )
        process.start()
        process.join(LONG_S if kill_after_s is None else kill_after_s)
        if process.is_alive():
            process.kill()
            process.join(LONG_S)
        return int(process.exitcode if process.exitcode is not None else 1)

    def whole(self, out: Path) -> tuple[Any, float]:
        """The digests of a result that nobody killed, and the seconds that it takes once the
        processes that it is forked from are warm."""
        for again in ((), ("--replace",)):
            start = time.monotonic()
            assert self.run(out, *again) == 0, self.log.read_text()
        return self.digests(out), time.monotonic() - start


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def many_steps(one: Recipe) -> Recipe:
    """Twelve steps and then six, a checkpoint at every second one."""
    first = replace(one.stage[0], batch_size=2)
    stages = (first, replace(first, epochs=1.0, learning_rate=3e-3))
    return replace(one, stage=stages, checkpoint_every=2)


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_adapter(
    tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    figures, commands = Figures("kills of a training"), []
    for name, one in (
        ("sft", sft_recipe(tiny_decoder, tmp_path)),
        ("classes", intent_recipe(tiny_encoder, tmp_path)),
    ):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(recipe_to_toml(many_steps(one)))
        command = Command(
            lambda out, recipe=recipe: ["train", str(recipe), "--out", str(out)],  # type: ignore[misc]
            lambda out: sha256_file(out / WEIGHTS),
            tmp_path / f"{name}.log",
        )
        commands.append((command, command.whole(tmp_path / name)))
    for seed in range(SEED, SEED + 4 * KILLS):
        if figures.seen["killed"] == KILLS:
            break
        chance, home = random.Random(seed), tmp_path / f"kill-{seed}"
        home.mkdir()
        command, (wanted, seconds) = commands[seed % 2]
        figures.tried += 1
        code = command.run(home / "run", kill_after_s=chance.random() * seconds)
        if chance.random() < 0.5 and code:
            code = command.run(home / "run", "--resume", kill_after_s=chance.random() * seconds)
        figures.count("killed" if code == -signal.SIGKILL else "done before")
        if code and command.run(home / "run", "--resume"):
            figures.fault("not resumed", f"seed {seed}: {command.log.read_text()[-300:]}")
        elif command.digests(home / "run") != wanted:
            figures.fault("wrong", f"seed {seed}: another adapter")
        elif left_over(home) or [*home.iterdir()] != [home / "run"]:
            figures.fault("wrong", f"seed {seed}: left over {[*home.iterdir()]}")
        else:
            figures.count("resumed to the same adapter")
    figures.check()


def files_of(bundle: Path) -> dict[str, str]:
    return {name: file.sha256 for name, file in read_manifest(bundle).files.items()}


def openable(folder: Path) -> Any:
    """The digests of a bundle that opens, every one checked; None where it does not."""
    try:
        with Runtime.open(folder, threads=1):
            return files_of(folder)
    except EdgetuneError:
        return None


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_half_written_that_opens(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    figures = Figures("kills of an export")
    adapters = [make_adapter(tiny_encoder, tmp_path / name, seed=s) for s, name in enumerate("ab")]
    commands = [
        Command(
            lambda out, adapter=adapter: [  # type: ignore[misc]
                "export", "--adapter", f"x={adapter}", "--base", str(tiny_encoder), "--out",
                str(out), "--precision", "fp32", "--threads", "1",
            ],
            files_of,
            tmp_path / f"{adapter.name}.log",
        )
        for adapter in adapters
    ]  # fmt: skip
    made = [command.whole(tmp_path / f"bundle-{k}") for k, command in enumerate(commands)]
    for seed in range(SEED, SEED + 4 * KILLS):
        if figures.seen["killed"] == KILLS:
            break
        chance, home = random.Random(seed), tmp_path / f"kill-{seed}"
        home.mkdir()
        (older, _), (wanted, seconds) = made
        figures.tried += 1
        more = ["--replace"] if chance.random() < 0.5 else []
        if more:  # an older bundle stands where the new one is to be
            assert commands[0].run(home / "b") == 0
        code = commands[1].run(home / "b", *more, kill_after_s=chance.random() * seconds)
        figures.count("killed" if code == -signal.SIGKILL else "done before")
        for folder in home.iterdir():
            if folder.is_dir() and openable(folder) not in (None, older, wanted):
                figures.fault("wrong", f"seed {seed}: {folder.name} opens and is neither")
        if more and openable(home / "b") is None and not list(home.glob(".replaced-*-b")):
            figures.fault("wrong", f"seed {seed}: the older bundle is gone")
        if code and commands[1].run(home / "b", *more):
            figures.fault("not resumed", f"seed {seed}: {commands[1].log.read_text()[-300:]}")
        elif openable(home / "b") != wanted:
            figures.fault("wrong", f"seed {seed}: another bundle")
        elif [*home.iterdir()] != [home / "b"]:
            figures.fault("wrong", f"seed {seed}: left over {left_over(home)}")
        else:
            figures.count("exported to the same bundle")
    figures.check()
