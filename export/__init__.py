"""Base + adapters → bundle: graph, rounded weights, adapter files, proof, manifest.

`export_bundle` writes one; `reprove` repeats the proof of one. See `edgetune.export.bundle` and
`edgetune.export.proof.prove`.
"""

from __future__ import annotations

if __name__ == "export":  # a second copy of every module would be made under the bare name
    raise ImportError("import edgetune.export, not export")
