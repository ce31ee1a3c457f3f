"""What a model forgets while it learns a task: general ability before and after, on the same items.

| module | for |
|---|---|
| items | texts become token ids to be scored |
| scoring | log-likelihoods in torch, with the context of several choices computed once |
| tasks | the general-ability sets: their files, their metrics |
| intervals | paired differences with 95 % intervals |
| measure | before and after on every task |
| picture | task gain against general loss, as SVG |
"""

from edgetune.forgetting.measure import General, Subject, compare
from edgetune.forgetting.tasks import TASKS

__all__ = ["TASKS", "General", "Subject", "compare"]
