"""Bundle → answers, on the device: no torch, no transformers, no peft, no onnx.

>>> from edgetune.runtime import Runtime
>>> with Runtime.open("bundle") as rt:
...     rt.classify(["where is my card?"], adapter="banking")

`Runtime` is imported when it is first asked for, so that `import edgetune.runtime` is quick.
Everything else is imported from its own file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.runtime.tasks.runtime import Runtime as Runtime

if __name__ == "runtime":  # a second copy of every module would be made under the bare name
    raise ImportError("import edgetune.runtime, not runtime")


def __getattr__(name: str) -> Any:
    if name != "Runtime":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edgetune.runtime.tasks.runtime import Runtime

    return Runtime


def __dir__() -> list[str]:
    return ["Runtime"]
