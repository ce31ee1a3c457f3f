"""Many rows answered by a bundle: divided into parts, resumed, by shards or by workers of Ray.

`Answerer` is what a pipeline of one's own uses (Ray Data, Spark, Dask): see `examples/pipelines`.
"""

from edgetune.bulk.answers import Answerer

__all__ = ["Answerer"]
