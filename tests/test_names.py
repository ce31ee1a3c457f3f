"""One name, one thing: what a room offers is not called as something else in another room.

Offered are functions, classes and types without a leading underscore, and of the constants those
that another file imports.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from test_rooms import HOUSE, room_of

# name → why two rooms may have it
TWINS = {
    "Answer": "the server's form of one over HTTP; training's sampled one",
    "Answered": "a prompt with its answer: read from a request; sampled in training",
    "Batch": "rows of one training step, in torch; rows that the engine decodes together, in numpy",
    "Precision": "of the arithmetic of training; of a bundle's weights",
    "Prompt": "training's are lists of dicts; a request's may be any sequence of mappings",
    "resolve": "what a source of artifacts has; what a recipe's automatic settings come to",
    "log": "each file's own logger",
    "main": "the entry point of a `python -m`",
}


def offered(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a constant) of everything a file defines at its top."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, False
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                yield from (
                    (one.id, one.id.isupper()) for one in names if isinstance(one, ast.Name)
                )
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.target.id.isupper()


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module without `edgetune.`, name) of everything a file imports by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield (node.module or "").removeprefix("edgetune."), alias.name


TREES = {name: ast.parse(path.read_text()) for name, path in HOUSE.items()}


def twins() -> dict[str, set[str]]:
    """Name → the rooms that offer something of this name, where that are several."""
    used = {pair for tree in TREES.values() for pair in imported(tree)}
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, tree in TREES.items():
        for name, is_constant in offered(tree):
            if not name.startswith("_") and (not is_constant or (module, name) in used):
                rooms[name].add(room_of(module))
    return {name: found for name, found in rooms.items() if len(found) > 1}


def test_no_two_rooms_offer_different_things_under_one_name() -> None:
    assert {name: rooms for name, rooms in twins().items() if name not in TWINS} == {}


def test_every_exception_is_needed() -> None:
    assert set(TWINS) - set(twins()) == set()
