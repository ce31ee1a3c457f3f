"""Training: recipe → run folder.

| module | for |
|---|---|
| run | the whole of it: data, base, adapter, stages, measurements, files |
| loop | the training loop, the same for every method |
| methods | what differs between methods |
| optimizer | AdamW and the learning-rate schedule |
| precision | fp32 or bf16, chosen by measurement |
| probe | the classification head's first weights |
| measure | validation metrics; what the adapter changes |
| journal | metrics.jsonl |
"""

from edgetune.training.run import RunSummary, run_recipe

__all__ = ["RunSummary", "run_recipe"]
