"""Many rows answered by a bundle, in parts, shards or by Ray; many recipes trained by it.

`Answerer` is what a pipeline of one's own uses (Ray Data, Spark, Dask): see `examples/pipelines`.
"""

from edgetune.bulk.answers import Answerer

__all__ = ["Answerer"]
