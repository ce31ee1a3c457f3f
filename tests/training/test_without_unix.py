"""Training imports nothing that Windows lacks."""

from __future__ import annotations

from process_helpers import python

CODE = """
import sys
import torch, transformers, sklearn.linear_model  # theirs are not ours to block
LACKING = ("fcntl", "resource", "pwd", "grp")
for name in LACKING:
    sys.modules[name] = None
import edgetune.training, edgetune.training.grpo_stage, edgetune.cli.train, edgetune.cli.export
import edgetune.export.bundle
try:
    import fcntl
except ImportError:
    print("imported without fcntl")
"""


def test_training_and_export_import_nothing_that_windows_lacks() -> None:
    done = python(CODE)
    assert done.stdout == "imported without fcntl\n", done.stderr
