"""A Spark data frame labelled by a bundle.

    python examples/pipelines/spark_udf.py BUNDLE IN OUT [ADAPTER]

IN: JSON Lines files with "text"; OUT: a folder. The bundle must have a classifier as its adapter.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.types import FloatType, StringType, StructField, StructType

from edgetune.bulk import Answerer

bundle, source, out, *adapter = sys.argv[1:]


def opened() -> Callable[[Any], dict[str, Any]]:
    """Called once in each of Spark's Python processes."""
    answers = Answerer(bundle, adapter=adapter[0] if adapter else None)

    def label(text: Any) -> dict[str, Any]:
        found = answers({"text": text})
        return {
            "label": np.array([one or "" for one in found["label"]]),
            "score": np.array(found["score"], np.float32),
        }

    return label


form = StructType([StructField("label", StringType()), StructField("score", FloatType())])
label = predict_batch_udf(opened, return_type=form, batch_size=64)
spark = SparkSession.builder.getOrCreate()
rows = spark.read.json(source)
rows.withColumn("answer", label("text")).write.json(out)
