"""Bundle → answers, on the device: no torch, no transformers, no peft, no onnx.

>>> from edgetune.runtime import Runtime
>>> with Runtime.open("bundle") as rt:
...     rt.classify(["where is my card?"], adapter="banking")

The names below are imported when they are first used, so that `import edgetune.runtime` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.runtime.adapters.packing import PackedAdapter as PackedAdapter
    from edgetune.runtime.adapters.packing import pack_adapter as pack_adapter
    from edgetune.runtime.bundle.digests import verify_files as verify_files
    from edgetune.runtime.bundle.manifest import Manifest as Manifest
    from edgetune.runtime.bundle.manifest import read_manifest as read_manifest
    from edgetune.runtime.engine.engine import DecoderEngine as DecoderEngine
    from edgetune.runtime.engine.engine import EncoderEngine as EncoderEngine
    from edgetune.runtime.generation.settings import GenerationSettings as GenerationSettings
    from edgetune.runtime.scheduler.requests import GenerationRequest as GenerationRequest
    from edgetune.runtime.scheduler.scheduler import Scheduler as Scheduler
    from edgetune.runtime.tasks.answers import Classification as Classification
    from edgetune.runtime.tasks.answers import Completion as Completion
    from edgetune.runtime.tasks.runtime import Runtime as Runtime
    from edgetune.runtime.tasks.tagging import TaggedSpan as TaggedSpan
    from edgetune.runtime.tasks.tagging import TaggedWord as TaggedWord
    from edgetune.runtime.tasks.tagging import Tagging as Tagging


if __name__ == "runtime":  # a second copy of every module would be made under the bare name
    raise ImportError("import edgetune.runtime, not runtime")
HOMES = {
    "Runtime": "tasks.runtime",
    "Completion": "tasks.answers",
    "Classification": "tasks.answers",
    "Tagging": "tasks.tagging",
    "TaggedWord": "tasks.tagging",
    "TaggedSpan": "tasks.tagging",
    "GenerationSettings": "generation.settings",
    "GenerationRequest": "scheduler.requests",
    "Scheduler": "scheduler.scheduler",
    "DecoderEngine": "engine.engine",
    "EncoderEngine": "engine.engine",
    "Manifest": "bundle.manifest",
    "read_manifest": "bundle.manifest",
    "verify_files": "bundle.digests",
    "PackedAdapter": "adapters.packing",
    "pack_adapter": "adapters.packing",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(HOMES)
