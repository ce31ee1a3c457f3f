"""Training: recipe → run folder.

| module | for |
|---|---|
| run | the whole of it: data, base, adapter, stages, measurements, files |
| summary | summary.json, the adapter's metadata, first and last words |
| stages, stage | one stage after the other; what a stage works with |
| loop | the training loop, the same for every method |
| learner | losses and gradients, in one process or in several |
| methods | what differs between methods |
| succession, features | the model of every stage; a frozen body's features, where only the head learns |
| replay | general text in every step |
| preference | `reward` and `dpo`: metrics, the reference policy |
| grpo | prompts → sampled answers → rewards → advantages |
| rollout, engine_rollout | the policy answers, by torch or by the exported graph |
| rewards, reward_adapter | what scores answers: Python functions, trained adapters |
| fused_lora, fused_ops | LoRA layers, and a decoder's small operations, as one function each |
| prefix_sharing, computing | what rows begin with in common, computed once; all of these around a forward pass |
| near_positions | of DeBERTa's relative positions those that a batch can reach |
| optimizer | AdamW and the learning-rate schedule |
| precision | fp32 or bf16, chosen by measurement |
| probe | a head's first weights |
| measure | validation metrics; what the adapter changes |
| journal, curves | metrics.jsonl, and TensorBoard's files |
| checkpoint, resume | an unfinished run's checkpoints; going on from one |
| memory | what a step frees stays for the next |
| device | CPU, CUDA or MPS; batches and random generators there |
| distributed | several processes that share every step's rows |
"""

from edgetune.training.run import run_recipe
from edgetune.training.summary import RunSummary

__all__ = ["RunSummary", "run_recipe"]
