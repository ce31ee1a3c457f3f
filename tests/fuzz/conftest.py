"""Prints the figures of the fuzz tests in one table, behind everything else."""

from __future__ import annotations

from typing import Any

from fuzz.figures import SEED, TABLE, table


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TABLE:
        terminalreporter.section(f"fuzz, from seed {SEED}")
        for line in table():
            terminalreporter.write_line(line)
