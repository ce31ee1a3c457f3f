"""The files in results/ → SPEED.md, and a picture for each benchmark; nothing else goes into them.

    python benchmarks/bench_page.py

Of each host its newest file is shown.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from edgetune.core.files import write_text
from edgetune.report.charts import Scale

HERE = Path(__file__).parent
OPENING = """# Speed, as `make bench` measures it

Made from the files in `benchmarks/results/` by `benchmarks/bench_page.py`; a test keeps it true.
`make bench` writes a file a machine and day, `BENCH="decode encoder" ROUNDS=3` only some of it;
`make peers` installs what is measured beside edgetune, each in an environment of its own. Engines
take turns, so that a machine that drifts hits all alike. Cells: the median of the rounds and its
95 % interval. `edgetune bench compare A B` compares two files.
"""
TITLES = {
    "decode": "Decoding",
    "serving": "Serving many at once",
    "encoder": "Encoders: a text to its embedding",
    "training": "Training",
}
BUSY = 0.5
"""Cores at other work beside a benchmark, from which on it is not final."""
WIDTH, LEFT, RIGHT, BAR, STEP = 780, 390, 70, 15, 22  # user units
STYLE = (
    ".t{font:12px system-ui,sans-serif;fill:#57606a}.own{fill:#0f8a7e}.peer{fill:#a5afba}"
    ".reach{stroke:#d1620d;stroke-width:1.5}"
    "@media(prefers-color-scheme:dark){.t{fill:#9aa6b2}.own{fill:#2dbcad}.peer{fill:#5d6875}}"
)
Row = Mapping[str, Any]


def newest(folder: Path) -> list[Path]:
    """Of each host, the newest last."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("????-??-??-*.json")):
        found[path.stem[11:]] = path
    return sorted(found.values())


def rendered(folder: Path) -> tuple[str, dict[Path, str]]:
    """The page, and the pictures by their places."""
    lines, pictures = list[str](), dict[Path, str]()
    for path in newest(folder):
        document = json.loads(path.read_text(encoding="utf-8"))
        lines += _host(path, document)
        for name, found in document["benchmarks"].items():
            lines += [f"### {TITLES[name]}", ""]
            if drawn := picture(found["measures"]):
                place = path.with_name(f"{path.stem}-{name}.svg")
                pictures[place] = drawn
                lines += [f"![{TITLES[name]}](results/{place.name})", ""]
            lines += [*_benchmark(found)]
    lines = lines or ["No file is there yet."]
    return "\n".join([OPENING, *lines]).rstrip() + "\n", pictures


def _host(path: Path, document: Mapping[str, Any]) -> Iterator[str]:
    host = document["host"]
    yield f"## {host['cpu']}, {host['cores']} cores, {path.name[:10]}"
    yield ""
    sets = ", ".join(host["features"])
    text = (
        f"{sets}; {host['memory_mb'] / 1024:.0f} GB. Raw samples: [the file](results/{path.name})."
    )
    yield from textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    yield ""


def _benchmark(found: Mapping[str, Any]) -> Iterator[str]:
    """The commands, the machine while they ran, what was measured, ratios, and what was not."""
    yield from (f"    {command}" for command in found["commands"])
    yield ""
    yield from textwrap.wrap(_around(found), 100, break_long_words=False, break_on_hyphens=False)
    yield ""
    plain = [one for one in found["measures"] if one["unit"] != "x" and one["target"] is None]
    judged = [one for one in found["measures"] if one not in plain]
    yield from _grid(plain)
    if judged:
        yield from ("| ratio or limit | median | 95 % | to reach |", "|---|---|---|---|")
        yield from (_judged(one) for one in judged)
        yield ""
    if found["not_measured"]:
        yield from ("| not measured | why | how to |", "|---|---|---|")
        for one in found["not_measured"]:
            yield f"| {one['what']} | {one['why']} | `{one['how']}` |"
        yield ""


def _around(found: Mapping[str, Any]) -> str:
    sides = [found["machine"][when] for when in ("before", "after")]
    one, more = ([side["read_gb_s"][name] for side in sides] for name in ("one", "all"))
    threads = sides[0]["threads"]
    text = f"Memory read by one thread {one[0]} GB/s before and {one[1]} after"
    text += f", by {threads} {more[0]} and {more[1]}. " if threads > 1 else ". "
    busy = max(side["busy_cores"] or 0 for side in sides)
    if busy > BUSY:
        text += f"**Other work was under way, on {busy:.1f} cores: not final.** "
    said = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rounds = found["rounds"]
    return text + f"{rounds} round{'s' if rounds > 1 else ''}, {found['seconds']} s; {said}."


def _grid(measures: Sequence[Row]) -> Iterator[str]:
    """A row a title and a column a figure, where each title has several; else a list."""
    figures = {(one["figure"], one["unit"]): None for one in measures}
    titles = list(dict.fromkeys(one["title"] for one in measures))
    at = {(one["title"], one["figure"], one["unit"]): one for one in measures}
    if len(at) < len(titles) * len(figures) * 0.75:
        yield from ("| what | of | median | 95 % |", "|---|---|---|---|")
        for one in measures:
            yield f"| {one['title']} | {one['figure']} | {_value(one)} | {_interval(one)} |"
    else:
        yield "| what | " + " | ".join(f"{name}, {unit}" for name, unit in figures) + " |"
        yield "|---" * (len(figures) + 1) + "|"
        for title in titles:
            cells = [at.get((title, *figure)) for figure in figures]
            yield f"| {title} | " + " | ".join(_cell(cell) for cell in cells) + " |"
    yield ""


def _judged(one: Row) -> str:
    reach = "–"
    if one["target"] is not None:
        sign, met = "≥" if one["more_is_better"] else "≤", "met" if one["met"] else "**missed**"
        reach = f"{sign} {one['target']:g}: {met}"
    return f"| {one['title']} | **{_value(one)}** | {_interval(one)} | {reach} |"


def number(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _value(one: Row) -> str:
    return f"{number(one['median'])} {one['unit']}"


def _interval(one: Row) -> str:
    return "–" if one["interval"] is None else " to ".join(map(number, one["interval"]))


def _cell(one: Row | None) -> str:
    if one is None:
        return "–"
    return number(one["median"]) + (f" ({_interval(one)})" if one["interval"] else "")


def picture(measures: Sequence[Row]) -> str:
    """Bars of what is pictured, in one unit; a line shows each interval."""
    chosen = [one for one in measures if one["pictured"]]
    if not chosen:
        return ""
    ends = [one["interval"][1] if one["interval"] else one["median"] for one in chosen]
    scale = Scale(0.0, max(ends), LEFT, WIDTH - RIGHT)
    title = f"{chosen[0]['figure']}, {chosen[0]['unit']}"
    height = STEP * (len(chosen) + 1) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text class="t" x="{LEFT}" y="14">{escape(title)}</text>',
    ]
    for row, one in enumerate(chosen, 1):
        y, end = row * STEP, scale(one["median"])
        kind = "peer" if one["peer"] else "own"
        parts.append(
            f'<text class="t" x="{LEFT - 8}" y="{y + 12}" text-anchor="end">'
            f"{escape(one['title'])}</text>"
            f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR}"'
            ' rx="2"/>'
        )
        if one["interval"]:
            low, high = map(scale, one["interval"])
            parts.append(f'<path class="reach" d="M{low:.1f} {y + BAR / 2}H{high:.1f}"/>')
            end = max(end, high)
        parts.append(
            f'<text class="t" x="{end + 6:.1f}" y="{y + 12}">{number(one["median"])}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    text, pictures = rendered(HERE / "results")
    write_text(HERE / "SPEED.md", text)
    for old in set((HERE / "results").glob("*.svg")) - set(pictures):
        old.unlink()
    for place, drawn in pictures.items():
        write_text(place, drawn)
    print(f"written: {HERE / 'SPEED.md'} and {len(pictures)} pictures")


if __name__ == "__main__":
    main()
