"""llama.cpp on the load of `serving.py llama`: requests of different adapters, one after the other,
as its server does them.

Its batches share one set of adapters, so requests that differ in theirs wait for each other. Run by
serving.py in llama-cpp-python's environment: python serving_llama.py MODEL.gguf THREADS
ADAPTER.gguf …; every line read is a round of JSON {"prompts": [token ids of a request each], "new":
tokens of an answer}, request i with adapter i; every line written is the seconds it took.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any


def main() -> None:
    """Load, say so, then answer rounds."""
    import llama_cpp
    import numpy as np

    file, threads, *paths = sys.argv[1:]
    model: Any = llama_cpp.Llama(
        file, n_ctx=1024, n_threads=int(threads), n_threads_batch=int(threads), verbose=False
    )
    adapters = [
        llama_cpp.llama_adapter_lora_init(model._model.model, path.encode()) for path in paths
    ]
    if not all(adapters):
        raise SystemExit("llama.cpp does not load an adapter")
    end = model.token_eos()

    def choose(adapter: Any) -> None:
        one, scale = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        if llama_cpp.llama_set_adapters_lora(model._ctx.ctx, one, 1, scale):
            raise SystemExit("llama.cpp does not take an adapter")

    def likeliest() -> int:
        logits = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1), shape=(model.n_vocab(),)
        )
        logits[end] = -np.inf  # as in the other engine: every answer has all its tokens
        return int(logits.argmax())

    print("ready", flush=True)
    for line in sys.stdin:
        load = json.loads(line)
        start = time.perf_counter()
        for adapter, prompt in zip(adapters, load["prompts"], strict=True):
            choose(adapter)
            model.reset()
            model.eval(prompt)
            for _ in range(load["new"] - 1):
                model.eval([likeliest()])
            likeliest()
        print(json.dumps(time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
