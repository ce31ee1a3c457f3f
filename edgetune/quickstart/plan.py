"""What the quickstart does: which adapters on which data, which bundles. The road itself is in
`run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from edgetune.recipe.read import load_recipe
from edgetune.recipe.schema import Recipe

DATA = "edgetune.quickstart.data"
SMOLLM2, MINILM = "builtin:smollm2-135m-instruct", "builtin:minilm-l6"


@dataclass(frozen=True)
class QuickstartTask:
    """One adapter: how it is trained, what it is measured on and called with."""

    name: str
    title: str
    recipe: Recipe
    test: Path  # held-out rows in the columns of the recipe
    calls: tuple[str, ...]  # requests that are in neither data file
    shots: int = 4  # training rows that the base without adapter is shown (text generation)


@dataclass(frozen=True)
class Shipment:
    """One bundle: the adapters of one base, and how its weights are stored."""

    name: str
    tasks: tuple[QuickstartTask, ...]
    precision: str = "int8"
    overrides: Mapping[str, str] = field(default_factory=dict)  # module name ending → precision


@dataclass(frozen=True)
class QuickstartPlan:
    """The whole road."""

    shipments: tuple[Shipment, ...]
    device: str = "host"
    requests: int = 10  # per adapter in the latency check
    prompt_tokens: int = 256  # of a decoder's requests in the latency check
    new_tokens: int = 32

    @property
    def tasks(self) -> tuple[QuickstartTask, ...]:
        """Every adapter in the order of training."""
        return tuple(task for shipment in self.shipments for task in shipment.tasks)

    @property
    def bases(self) -> tuple[str, ...]:
        """Every base, once."""
        return tuple(dict.fromkeys(task.recipe.base for task in self.tasks))


def embedded_plan(
    *, decoder: str = SMOLLM2, encoder: str = MINILM, overrides: Sequence[str] = ()
) -> QuickstartPlan:
    """The plan on the embedded data; `overrides` are recipe settings for every training
    (`stage.0.max_steps=3`).
    """
    home = _task(
        "home",
        "home assistant → JSON action",
        decoder,
        overrides,
        calls=(
            "dim the office lights to a quarter",
            "it is freezing in here",
            "lock the shed and thanks",
        ),
    )
    support = _task(
        "support",
        "support message → intent",
        encoder,
        overrides,
        calls=(
            "the tracking page has not moved for a week",
            "i was charged two times for the same headphones",
        ),
    )
    urgency = _task(
        "urgency",
        "maintenance message → urgency",
        encoder,
        overrides,
        calls=(
            "Smell of gas in the boiler room!",
            "A fresh coat of paint for the fence would be nice.",
        ),
    )
    return QuickstartPlan(
        shipments=(Shipment("smollm2", (home,)), Shipment("minilm", (support, urgency)))
    )


def data_file(name: str) -> Path:
    """An embedded file. The package is always installed as plain files, so this is a real path."""
    return Path(str(resources.files(DATA).joinpath(name)))


def _task(
    name: str, title: str, base: str, overrides: Sequence[str], *, calls: tuple[str, ...]
) -> QuickstartTask:
    recipe = load_recipe(data_file(f"{name}.toml"), [f'base="{base}"', *overrides])
    return QuickstartTask(name, title, recipe, data_file(f"{name}_test.jsonl"), calls)
