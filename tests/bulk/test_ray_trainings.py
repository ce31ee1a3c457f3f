"""Recipes trained by tasks of Ray: the adapters of one process, though a worker is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from process_helpers import free_port
from resume_helpers import WEIGHTS
from training_helpers import sft_recipe, silent, write_rows

from edgetune.recipe.read import recipe_to_toml
from edgetune.recipe.runs import plan_runs
from edgetune.training.many import train_here

ray = pytest.importorskip("ray", reason='needs the extra ray: pip install "edgetune[ray]"')


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers know no tests
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def recipes(tiny_decoder: Path, tmp_path: Path) -> list[Path]:
    """Three recipes that write a checkpoint a step, and one whose rows are broken."""
    paths = []
    for seed, name in enumerate(("ann", "bob", "cem", "dan")):
        text = recipe_to_toml(sft_recipe(tiny_decoder, tmp_path, max_steps=6))
        text = text.replace("seed = 0", f"seed = {seed}\ncheckpoint_every = 1")
        paths.append(tmp_path / f"{name}.toml")
        paths[-1].write_text(text)
    broken = write_rows(tmp_path / "broken.jsonl", [{"prompt": "no answer"}])
    paths[1].write_text(text.replace(str(tmp_path / "actions.jsonl"), str(broken)))
    return paths


class Killed:
    """Once it is in a worker, that one is killed at the third checkpoint of a run, the first time;
    `log` says which process wrote which checkpoint.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.name, self.log = name, log

    def __setstate__(self, state: dict[str, Any]) -> None:
        from edgetune.training.checkpoint import Checkpoints

        self.__dict__ |= state
        write = Checkpoints.write
        if write.__name__ == "dying":  # this worker has trained another run
            return

        def dying(checkpoints: Checkpoints, state: Any) -> None:
            write(checkpoints, state)
            if checkpoints.folder.parent.name == self.name:
                first = not self.log.exists() or self.log.read_text().startswith(f"{os.getpid()} ")
                with self.log.open("a") as log:
                    log.write(f"{os.getpid()} {state.position.step}\n")
                if first and state.position.step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

        Checkpoints.write = dying  # type: ignore[method-assign]

    def __call__(self, folder: Path, result: Any) -> None:
        """Nothing more is written."""


def test_an_address_where_nobody_is_is_a_line(
    recipes: list[Path], command_line: CommandLine
) -> None:
    assert not ray.is_initialized()  # as below, where `cluster` is
    code, _, err = command_line("train", recipes[0], "--ray", f"127.0.0.1:{free_port()}")
    assert code == 2 and "there is no Ray cluster" in err and len(err.splitlines()) == 1


def test_tasks_train_what_one_process_does_though_one_is_killed_and_one_fails(
    cluster: None, recipes: list[Path], tmp_path: Path
) -> None:
    from edgetune.bulk.ray_trainings import train_by_ray

    alone = {
        one.run.name: one
        for one in train_here(plan_runs(recipes, out=tmp_path / "alone"), progress=silent())
    }
    runs, log = plan_runs(recipes, out=tmp_path / "ray"), tmp_path / "checkpoints.log"
    killed = Killed("cem", log)
    done = {one.run.name: one for one in train_by_ray(runs, progress=silent(), write_more=killed)}
    written = [line.split() for line in log.read_text().splitlines()]
    assert [int(step) for _, step in written] == [1, 2, 3, 4, 5, 6]
    assert len({process for process, _ in written[:3]}) == 1 and written[2][0] != written[3][0]
    assert done.keys() == alone.keys() == {"ann", "bob", "cem", "dan"}
    assert "broken.jsonl" in str(done["bob"].error)
    assert str(done["bob"].error) == str(alone["bob"].error)
    for name in ("ann", "cem", "dan"):
        ours, theirs = (tmp_path / place / name / WEIGHTS for place in ("ray", "alone"))
        assert ours.read_bytes() == theirs.read_bytes()
        assert done[name].value == alone[name].value
        assert not (tmp_path / "ray" / name / "checkpoints").exists()


def test_the_command_compares_them_and_a_sweep_goes_the_same_way(
    cluster: None, recipes: list[Path], command_line: CommandLine, tmp_path: Path
) -> None:
    again = ["train", *recipes[:2], "--out", tmp_path / "all", "--set", "stage.0.max_steps=2"]
    code, out, err = command_line(*again, "--ray", "--workers", 1)
    assert code == 1 and [line.split()[0] for line in out.splitlines()[1:3]] == ["ann", "bob"]
    assert err.startswith("2 runs on 2 processors\n1/2 ann  loss ") and "2/2 bob  failed" in err
    assert (tmp_path / "all" / "comparison.html").exists()
    assert (tmp_path / "all" / "ann" / "report.html").exists()
    assert "1/2 ann  finished before: loss" in command_line(*again, "--ray", "--workers", 1)[2]
    sweep = ["sweep", recipes[0], "--seeds", "0,1", "--set", "stage.0.max_steps=2"]
    code, out, _ = command_line(*sweep, "--out", tmp_path / "swept", "--ray")
    assert code == 0 and " ± " in out
    adapters = [tmp_path / place / WEIGHTS for place in ("all/ann", "swept/seed=0")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_run_that_fits_no_machine_is_a_line(
    cluster: None, recipes: list[Path], command_line: CommandLine
) -> None:
    for setting, said in (("threads=64", "enough CPUs"), ("device=cuda", "enough GPUs")):
        code, _, err = command_line("train", recipes[0], "--ray", "--set", setting)
        assert code == 2 and said in err and len(err.splitlines()) == 1
