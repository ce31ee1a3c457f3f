"""edgetune: fine-tune small language models, prove the export, run many adapters on one device."""

__version__ = "0.1.0"
