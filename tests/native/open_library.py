"""Open the native engine's library that is installed: what a new wheel is tried with."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Print the instruction sets of this processor that the library has kernels for."""
    package = find_spec("edgetune")  # where it is installed; nothing of it is imported
    assert package is not None and package.origin is not None, "edgetune is not installed"
    folder = Path(package.origin).parent / "runtime" / "engine" / "native"
    (path,) = folder.glob("libedgetune_native.*")
    library = ctypes.CDLL(str(path))
    library.edgetune_instruction_sets.restype = ctypes.c_char_p
    print(f"{path.name}: {library.edgetune_instruction_sets().decode()}")


if __name__ == "__main__":
    main()
