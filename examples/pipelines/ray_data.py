"""Rows of Ray Data answered by a bundle.

    python examples/pipelines/ray_data.py BUNDLE IN OUT [ADAPTER]

IN: JSON Lines files with "text" or "prompt" (and "adapter", if rows choose theirs); OUT: a folder.
"""

import sys

import ray

from edgetune.bulk import Answerer

bundle, source, out, *adapter = sys.argv[1:]
rows = ray.data.read_json(source)
answered = rows.map_batches(
    Answerer,
    fn_constructor_args=(bundle,),
    fn_constructor_kwargs={"adapter": adapter[0] if adapter else None},
    compute=ray.data.ActorPoolStrategy(size=1),
    batch_size=64,
)
answered.write_json(out)
