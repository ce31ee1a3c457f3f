"""What runs on the device that is measured over ssh, under whatever Python it has: standard library
only, and nothing of edgetune, because this comes before it. `remote.py` sends the source of this
file.

    python3 -c SOURCE probe FOLDER            what is there, as JSON
    python3 -c SOURCE lacks FOLDER < LIST     of the files in LIST, how much of each is here
    python3 -c SOURCE receive FOLDER < STREAM files, each behind a line of JSON
    python3 -c SOURCE remove FOLDER
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

ONCE_MORE = 75  # EX_TEMPFAIL of sysexits.h
NEEDS = ("numpy", "onnxruntime", "tokenizers", "jinja2", "safetensors", "click")


def probe(folder: Path) -> dict[str, Any]:
    """Python, processor, free room, and which packages are missing."""
    here = next(place for place in (folder, *folder.parents) if place.is_dir())
    return {
        "python": list(sys.version_info[:2]),
        "executable": sys.executable,
        "system": platform.system(),
        "machine": platform.machine(),
        "free_bytes": shutil.disk_usage(here).free,
        "missing": [name for name in NEEDS if importlib.util.find_spec(name) is None],
    }


def lacks(folder: Path) -> dict[str, int]:
    """Path → bytes that are here already, of every file of the list that is not here whole."""
    found = {}
    for name, (size, digest) in json.load(sys.stdin).items():
        place = folder / name
        if place.is_file() and place.stat().st_size == size and sha256(place) == digest:
            continue
        part = part_of(place)
        begun = part.stat().st_size if part.is_file() else 0
        found[name] = begun if begun <= size else 0
    return found


def receive(folder: Path) -> dict[str, bool]:
    """Write what comes: a line of JSON (path, from, size, sha256), then the bytes from there on."""
    stream = sys.stdin.buffer
    while line := stream.readline():
        head = json.loads(line)
        place = folder / head["path"]
        place.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(place)
        if head["from"] > (part.stat().st_size if part.is_file() else 0):
            sys.stderr.write("an earlier copy was still at work")
            sys.exit(ONCE_MORE)
        with part.open("r+b" if head["from"] else "wb") as file:
            file.seek(head["from"])
            left = head["size"] - head["from"]
            while left:
                piece = stream.read(min(left, 1 << 20))
                if not piece:
                    sys.exit(f"the connection ended within {head['path']}")
                file.write(piece)
                left -= len(piece)
        if sha256(part) != head["sha256"]:
            part.unlink()
            sys.exit(f"{head['path']} arrived damaged")
        part.replace(place)
    return {"received": True}


def remove(folder: Path) -> dict[str, bool]:
    """Leave nothing behind."""
    shutil.rmtree(folder, ignore_errors=True)
    return {"removed": not folder.exists()}


def part_of(place: Path) -> Path:
    """Where a file is while it arrives."""
    return place.with_name(place.name + ".part")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


if __name__ == "__main__":
    work = {"probe": probe, "lacks": lacks, "receive": receive, "remove": remove}
    json.dump(work[sys.argv[1]](Path(sys.argv[2]).expanduser()), sys.stdout)  # type: ignore[operator]
