"""A Dask data frame answered by a bundle.

    python examples/pipelines/dask_frames.py BUNDLE IN OUT [ADAPTER]

IN: JSON Lines files with "text" or "prompt"; OUT: a folder of JSON Lines.
"""

import sys

import dask.dataframe as frames
import pandas as pd

from edgetune.bulk import Answerer

bundle, source, out, *adapter = sys.argv[1:]
answers = Answerer(bundle, adapter=adapter[0] if adapter else None)  # opened once in each process


def answered(frame: pd.DataFrame) -> pd.DataFrame:
    """One partition with its answers."""
    return pd.DataFrame(answers(frame.to_dict("list")), index=frame.index)


rows = frames.read_json(source, lines=True)
rows.map_partitions(answered, meta=answered(rows.head(1))).to_json(out)
