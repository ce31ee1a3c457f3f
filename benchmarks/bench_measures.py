"""What the benchmarks' JSON lines say, as measures of one form: a title, a unit, raw samples, and
the target where one is set; ratios are taken round by round, because the rounds are interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 2000
FEWEST_ROUNDS = 3
"""An interval of fewer says nothing."""
PEERS = ("onnxruntime-genai", "llama.cpp", "sentence-transformers", "onnxruntime fp32", "trl")
PEERS += ("trainer", "the same requests in llama.cpp")


@dataclass(frozen=True)
class Measure:
    """One figure of one thing that was measured. `samples`: in the order they were taken, `a_round`
    of them a round; `pictured`: in the benchmark's picture.
    """

    title: str
    figure: str
    unit: str
    samples: Sequence[float]
    more_is_better: bool
    target: float | None = None
    a_round: int = 1
    pictured: bool = False

    def rounds(self) -> list[float]:
        """The median of each round."""
        starts = range(0, len(self.samples), self.a_round)
        return [float(np.median(self.samples[at : at + self.a_round])) for at in starts]

    def to_dict(self) -> dict[str, Any]:
        """For the results file."""
        low, high = interval(self.rounds())
        middle = float(np.median(self.rounds()))
        met = self.target is None or (
            middle >= self.target if self.more_is_better else middle <= self.target
        )
        return {
            "title": self.title,
            "figure": self.figure,
            "unit": self.unit,
            "more_is_better": self.more_is_better,
            "peer": self.title.startswith(PEERS),
            "pictured": self.pictured,
            "median": _four(middle),
            "interval": None if low is None or high is None else [_four(low), _four(high)],
            "target": self.target,
            "met": None if self.target is None else met,
            "a_round": self.a_round,
            "samples": [_four(value) for value in self.samples],
        }


def interval(rounds: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of the rounds' median, rounds drawn with replacement."""
    if len(rounds) < FEWEST_ROUNDS:
        return None, None
    drawn = np.random.default_rng(0).choice(np.array(rounds), (DRAWS, len(rounds)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def _four(value: float) -> float:
    """Six digits are more than any of these figures holds."""
    return float(f"{value:.6g}")


def ratio(title: str, of: Measure, to: Measure, target: float | None = None) -> Measure:
    """of / to, round by round."""
    pairs = zip(of.rounds(), to.rounds(), strict=True)
    return Measure(title, "ratio", "x", [a / b for a, b in pairs], of.more_is_better, target)


def best(measures: Sequence[Measure]) -> Measure | None:
    """Of peers, by the median."""
    if not measures:
        return None
    order = sorted(measures, key=lambda one: float(np.median(one.rounds())))
    return order[-1] if order[0].more_is_better else order[0]


def of_decode(line: Mapping[str, Any]) -> Iterator[Measure]:
    """`decode.py`: each configuration's speeds, memory and load, and the ratios to reach."""
    speeds: dict[str, Measure] = {}
    prefills: dict[str, Measure] = {}
    for title, row in line["results"].items():
        speeds[title] = Measure(
            title, "decode", "tok/s", row["decode_rounds"], more_is_better=True, pictured=True
        )
        prefills[title] = Measure(title, "prefill", "tok/s", row["prefill_rounds"], True)
        yield from (speeds[title], prefills[title])
        yield Measure(title, "peak", "MB", [row["peak_mb"]], False)
        yield Measure(title, "load", "s", [row["load_s"]], False)
    peers = {title: one for title, one in speeds.items() if title.startswith(PEERS)}
    own, active = (f"edgetune, {state} active" for state in ("none", "adapter"))
    off = best([one for title, one in peers.items() if "adapter active" not in title])
    on = best([one for title, one in peers.items() if "adapter active" in title])
    if on is not None and active in speeds:
        yield ratio(f"decode, adapter active: edgetune / {on.title}", speeds[active], on, 2.2)
    if off is not None:
        yield ratio(f"decode, none active: edgetune / {off.title}", speeds[own], off, 1.6)
    for title, target in (("onnxruntime-genai, this bundle", 2.0), ("llama.cpp", 4.5)):
        if title in prefills:
            yield ratio(f"prefill: edgetune / {title}", prefills[own], prefills[title], target)
    if active in speeds:
        yield ratio("decode: adapter active / none active", speeds[active], speeds[own], 0.94)
        many = speeds["edgetune, 8 streams with 8 adapters"]
        yield ratio("decode: 8 streams with 8 adapters / one", many, speeds[active], 4.5)


def of_serving(line: Mapping[str, Any]) -> Iterator[Measure]:
    """`serving.py`: its rows as they are."""
    for row in line["rows"]:
        yield Measure(
            row["title"],
            row["section"],
            row["unit"],
            row["samples"] or [row["value"]],
            row["at_least"] or row["unit"] == "tokens/s",
            row["target"],
            pictured=row["unit"] == "tokens/s" and "steps" not in row["title"],
        )


def of_encoder(line: Mapping[str, Any]) -> Iterator[Measure]:
    """`encoder.py`: p50 from the text and from the ids, and the ratios to reach."""
    figures = {"whole": "text → embedding", "graph": "token ids → embedding"}
    found: dict[tuple[str, str], Measure] = {}
    for kind, samples in line["samples_ms"].items():
        title, _, figure = kind.rpartition(", ")
        found[title, figure] = Measure(
            title,
            figures[figure],
            "ms",
            samples,
            False,
            a_round=line["sentences"],
            pictured=figure == "whole",
        )
    yield from found.values()
    for (title, figure), own in found.items():
        for peer in ("sentence-transformers", "onnxruntime fp32"):
            if (peer, figure) in found and title.startswith("edgetune"):
                to = found[peer, figure]
                target = 0.6 if figure == "whole" else None
                yield ratio(f"{figures[figure]}: {title} / {peer}", own, to, target)


def of_training(line: Mapping[str, Any]) -> Iterator[Measure]:
    """`training.py`: real tokens a second of each turn but the first, and edgetune's ratios."""
    task = line["task"]
    targets = {("sft", "trl"): 2.0, ("sft", "trainer"): 1.4, ("classification", "trainer"): 2.0}
    speeds = {
        name: Measure(
            name,
            f"{task}, real tokens",
            "tok/s",
            [turn["tokens"] / turn["seconds"] for turn in turns[1:]],
            True,
            pictured=task == "sft",
        )
        for name, turns in line["turns"].items()
    }
    for name, speed in speeds.items():
        yield speed
        yield Measure(name, f"{task}, peak", "MB", [line["ends"][name]["mb"]], False)
    for name, speed in speeds.items():
        if name != "edgetune":
            target = targets.get((task, name))
            yield ratio(f"{task}: edgetune / {name}", speeds["edgetune"], speed, target)


READ: dict[str, Callable[[Mapping[str, Any]], Iterator[Measure]]] = {
    "decode": of_decode,
    "serving": of_serving,
    "encoder": of_encoder,
    "training": of_training,
}
