"""Bundle → answers, on the device: no torch, no transformers, no peft, no onnx.

>>> from edgetune.runtime import Runtime
>>> with Runtime.open("bundle") as rt:
...     rt.classify(["where is my card?"], adapter="banking")

The names below are imported when they are first used, so that `import edgetune.runtime` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ == "runtime":  # a second copy of every module would be made under the bare name
    raise ImportError("import edgetune.runtime, not runtime")

if TYPE_CHECKING:
    from edgetune.runtime.adapters import PackedAdapter as PackedAdapter
    from edgetune.runtime.adapters import pack_adapter as pack_adapter
    from edgetune.runtime.answers import Classification as Classification
    from edgetune.runtime.answers import Completion as Completion
    from edgetune.runtime.digests import verify_files as verify_files
    from edgetune.runtime.engine import DecoderEngine as DecoderEngine
    from edgetune.runtime.engine import EncoderEngine as EncoderEngine
    from edgetune.runtime.generation import GenerationSettings as GenerationSettings
    from edgetune.runtime.manifest import Manifest as Manifest
    from edgetune.runtime.manifest import read_manifest as read_manifest
    from edgetune.runtime.runtime import Runtime as Runtime
    from edgetune.runtime.scheduler import GenerationRequest as GenerationRequest
    from edgetune.runtime.scheduler import Scheduler as Scheduler
    from edgetune.runtime.tagging import TaggedSpan as TaggedSpan
    from edgetune.runtime.tagging import TaggedWord as TaggedWord
    from edgetune.runtime.tagging import Tagging as Tagging

HOMES = {
    "Runtime": "runtime",
    "Completion": "answers",
    "Classification": "answers",
    "Tagging": "tagging",
    "TaggedWord": "tagging",
    "TaggedSpan": "tagging",
    "GenerationSettings": "generation",
    "GenerationRequest": "scheduler",
    "Scheduler": "scheduler",
    "DecoderEngine": "engine",
    "EncoderEngine": "engine",
    "Manifest": "manifest",
    "read_manifest": "manifest",
    "verify_files": "digests",
    "PackedAdapter": "adapters",
    "pack_adapter": "adapters",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(HOMES)
