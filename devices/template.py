"""A profile of one's own: a form to fill in."""

from __future__ import annotations

import dataclasses

from edgetune.core.settings import toml_value
from edgetune.devices.budget import SCALARS, TIMED
from edgetune.devices.loader import FIGURES, MEASURED, Device

HEAD = """\
# A device for `edgetune check BUNDLE --device FILE.toml`.
# Fill in what is known, take the # in front of it away, and say where each figure was read:
# a profile that lacks something is refused with everything that it lacks.
"""
TEXTS = {
    "name": "my-board",
    "title": "My board, 4 GB",
    "arch": "aarch64",
    "cpu": "4 x Cortex-A76",
}
LISTS = {
    "features": 'instruction sets, as ["asimd", "asimddp"]',
    "providers": 'what runs the graph, in order of preference, as ["xnnpack", "cpu"]',
    "notes": "what a reader of the figures should know",
}
SOURCE = """\
[[source]] # one or more: where figures were read, and what the page says
figures = [] # as {figures}
url = ""
read = ""
"""
BUDGETS = {
    "decoder": ("ttft_ms", "tpot_ms", "load_ms", "swap_ms", "peak_rss_mb", "bundle_mb"),
    "encoder": ("request_ms", "load_ms", "peak_rss_mb", "bundle_mb"),
}


def template() -> str:
    """A commented profile; it loads once its lines are filled in."""
    lines = [HEAD]
    for field in dataclasses.fields(Device):
        if field.name in TEXTS:
            lines.append(f"{field.name} = {toml_value(TEXTS[field.name])}")
        elif field.metadata.get("help") and field.name not in LISTS:
            lines.append(f"# {field.name} =  # {field.metadata['help']}{_unless(field.name)}")
        elif field.name in LISTS:
            lines.append(f"# {field.name} =  # {LISTS[field.name]}")
    meanings = {**{f"{key}_ms": meaning for key, meaning in TIMED.items()}, **SCALARS}
    for kind, keys in BUDGETS.items():
        lines += ["", f"[budget.{kind}]"]
        lines += [f"# {key} =  # {meanings[key]}" for key in keys]
    return "\n".join([*lines, "", SOURCE.format(figures=toml_value(list(FIGURES)))])


def _unless(figure: str) -> str:
    """How a figure can be spared."""
    spared = [key for key, others in MEASURED.items() if figure in others]
    if figure in MEASURED:
        return f"; instead of {' and '.join(MEASURED[figure])}, or beside it"
    return f"; or {spared[0]}" if spared else ""
