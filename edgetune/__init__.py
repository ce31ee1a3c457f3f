"""edgetune: fine-tune small language models, prove the export, run many adapters on one device."""

from __future__ import annotations

__version__ = "0.1.0"
