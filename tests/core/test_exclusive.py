"""One writer a folder, and what a killed one leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from process_helpers import python

from edgetune.core.errors import OutputError
from edgetune.core.exclusive import exclusive

HOLD = """
import sys, time
from pathlib import Path
from edgetune.core.exclusive import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_while_the_first_lives_and_not_after_it_was_killed(
    tmp_path: Path,
) -> None:
    first = holder(tmp_path / "run")
    refused = pytest.raises(OutputError, match="another process is writing this folder")
    with refused, exclusive(tmp_path / "run"):
        pass
    with exclusive(tmp_path / "run-2"):
        pass
    first.kill()
    first.wait()
    with exclusive(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_in_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    with exclusive(tmp_path / "run"), pytest.raises(OutputError), exclusive(tmp_path / "run"):
        pass
    with exclusive(tmp_path / "run"):
        pass


def test_the_next_writer_clears_and_restores_what_a_killed_one_left(tmp_path: Path) -> None:
    for name in (".partial-0123abcd-bundle", ".replaced-0123abcd-bundle"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with exclusive(tmp_path / "bundle"):
        assert (tmp_path / "bundle" / "file").read_text() == ".replaced-0123abcd-bundle"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


WINDOWS = """
import sys
sys.modules["fcntl"] = None
held = []
class msvcrt:
    LK_NBLCK = 2
    def locking(descriptor, mode, count):
        if held:
            raise PermissionError(13, "locked")
        held.append(descriptor)
sys.modules["msvcrt"] = msvcrt
from pathlib import Path
from edgetune.core.errors import OutputError
from edgetune.core.exclusive import exclusive
with exclusive(Path(sys.argv[1])):
    try:
        with exclusive(Path(sys.argv[1])): print("both")
    except OutputError: print("refused")
"""


def test_without_fcntl_the_lock_is_that_of_windows(tmp_path: Path) -> None:
    done = python(f"import sys; sys.argv = ['', {str(tmp_path / 'run')!r}]\n{WINDOWS}")
    assert (done.stdout, done.stderr) == ("refused\n", "")
