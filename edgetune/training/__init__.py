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
| journal, curves | metrics.jsonl, and TensorBoard's files |
| checkpoint, resume | an unfinished run's checkpoints; going on from one |
| device | CPU, CUDA or MPS; batches and random generators there |
| distributed | several processes that share every step's rows |
"""

from edgetune.training.run import RunSummary, run_recipe

__all__ = ["RunSummary", "run_recipe"]
