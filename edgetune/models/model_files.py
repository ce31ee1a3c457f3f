"""What a base's JSON files say, and the bases whose weights are already quantised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune.core.errors import BaseModelError
from edgetune.core.layout import MODEL_CONFIG

# Where a configuration says that its weights are quantised, and the files of the tools that wrote
# it beside: AutoGPTQ's and AutoAWQ's.
QUANTISED_KEYS = ("quantization_config", "compression_config")
QUANTISED_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; BaseModelError where it cannot be read, or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"cannot be read: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise BaseModelError("not a JSON object", where=str(path))
    return value


def refuse_quantised(config: Mapping[str, Any], folder: Path) -> None:
    """BaseModelError for weights that bitsandbytes, GPTQ, AWQ … have already rounded: neither
    training nor an export reads their packed form.
    """
    kinds = [config[key] for key in QUANTISED_KEYS if config.get(key)]
    kinds += [name for file, name in QUANTISED_FILES.items() if (folder / file).exists()]
    if not kinds:
        return
    kind = kinds[0]
    name = kind.get("quant_method") or kind.get("quant_type") if isinstance(kind, dict) else kind
    raise BaseModelError(
        "the weights of this base are already quantised",
        where=str(folder / MODEL_CONFIG),
        expected="weights in float32, float16 or bfloat16",
        got=str(name or "a quantization_config"),
        fix="Give the unquantised model that it was made from (for an adapter: its --base);"
        " `export --precision int4` quantises it for the device.",
    )
