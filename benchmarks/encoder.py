"""One sentence → its embedding: a MiniLM bundle beside sentence-transformers and plain ONNX
Runtime; a table, then one JSON line.

    python benchmarks/encoder.py --bundle BUNDLE [--adapter NAME] [--base FOLDER --peer-python
    PYTHON] [--texts FILE.jsonl] [--rounds 20] [--accuracy]

BUNDLE is an encoder's (`edgetune export --precision int8`), FOLDER its base in transformers' files,
PYTHON one of an environment with `sentence-transformers[onnx]` (`benchmarks/peers.toml`). The peers
share one worker process: sentence-transformers with its ONNX backend (the graph is optimum's fp32
export), and the same file in a plain ONNX Runtime session with `tokenizers` and mean pooling in
numpy. All take the same
sentences in turns, every engine on `--threads` threads; times are of one sentence at a time,
medians over all. "graph" starts from token ids, "whole" from the text.

`--accuracy` compares the embeddings: Spearman on STS-B's test rows, and Banking77 by a logistic
regression (train → test), both read from $EDGETUNE_DATASETS.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Encode = Callable[[Any], Any]


def timed(encode: Encode, inputs: Sequence[Any]) -> list[float]:
    """Milliseconds of each input, after one that is not counted."""
    encode(inputs[0])
    taken = []
    for one in inputs:
        start = time.perf_counter()
        encode(one)
        taken.append(1e3 * (time.perf_counter() - start))
    return taken


# The peers' worker, run by their own python: no edgetune in there.


def pooled(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """states (B, S, H), mask (B, S) → (B, H)."""
    weights = mask[..., None].astype(np.float32)
    return (states * weights).sum(1) / weights.sum(1)


class Peers:
    """sentence-transformers on ONNX, and the same graph in a plain session."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime
        import torch
        from sentence_transformers import SentenceTransformer
        from tokenizers import Tokenizer

        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = SentenceTransformer(
            str(folder),
            backend="onnx",
            model_kwargs={"provider": "CPUExecutionProvider", "session_options": options},
        )
        self.model.save_pretrained(str(folder.parent / "exported"))
        self.session = onnxruntime.InferenceSession(
            str(next((folder.parent / "exported").rglob("*.onnx"))),
            options,
            providers=["CPUExecutionProvider"],
        )
        self.names = [value.name for value in self.session.get_inputs()]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()

    def features(self, text: str) -> Any:
        """What sentence-transformers' tokenizer makes of a text."""
        tokenize = getattr(self.model, "preprocess", None) or self.model.tokenize
        return tokenize([text])

    def plain(self, ids: Sequence[int]) -> np.ndarray:
        """Token ids → embedding in the plain session."""
        row = np.array([ids], np.int64)
        feed = {
            "input_ids": row,
            "attention_mask": np.ones_like(row),
            "token_type_ids": np.zeros_like(row),
        }
        return pooled(
            self.session.run(None, {name: feed[name] for name in self.names})[0],
            feed["attention_mask"],
        )

    def times(self, texts: list[str]) -> dict[str, list[float]]:
        """One turn of each."""
        import torch

        ids = [self.tokenizer.encode(text).ids for text in texts]
        features = [self.features(text) for text in texts]
        with torch.no_grad():
            return {
                "sentence-transformers, whole": timed(
                    lambda text: self.model.encode([text]), texts
                ),
                "sentence-transformers, graph": timed(lambda one: self.model(dict(one)), features),
                "onnxruntime fp32, whole": timed(
                    lambda text: self.plain(self.tokenizer.encode(text).ids), texts
                ),
                "onnxruntime fp32, graph": timed(self.plain, ids),
            }


def serve_peers(folder: Path, threads: int) -> None:
    """Lines in: {"times": texts} or {"encode": texts, "to": FILE}; a line out for each."""
    out, sys.stdout = sys.stdout, sys.stderr
    peers = Peers(folder, threads)
    print(json.dumps({"ready": peers.session.get_providers()}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "times" in asked:
            answer: Any = peers.times(asked["times"])
        else:
            np.save(asked["to"], peers.model.encode(asked["encode"], batch_size=32))
            answer = asked["to"]
        print(json.dumps(answer), file=out, flush=True)


# Ours.


class Ours:
    """A bundle, with no adapter active and with one."""

    def __init__(self, bundle: Path, adapter: str | None, threads: int) -> None:
        from edgetune.runtime import Runtime

        self.runtime, self.adapter = Runtime.open(bundle, threads=threads), adapter

    def times(self, texts: list[str]) -> dict[str, list[float]]:
        """One turn of each."""
        runtime, found = self.runtime, {}
        ids = [runtime.text_ids(text) for text in texts]
        for label, name in {
            "none active": None,
            **({"r = 8 active": self.adapter} if self.adapter else {}),
        }.items():
            bound = [runtime.bound(name)]
            found[f"edgetune, {label}, whole"] = timed(
                lambda text, name=name: runtime.embed([text], name, normalize=False), texts
            )
            found[f"edgetune, {label}, graph"] = timed(
                lambda row, bound=bound: runtime.encoder.run([row], bound), ids
            )
        return found


def start_worker(options: argparse.Namespace, folder: Path) -> Any:
    """The peers' process, ready; FOLDER's files as links, so that nothing is written there."""
    copy = folder / "base"
    copy.mkdir()
    for file in options.base.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    command = [
        str(options.peer_python),
        __file__,
        "--worker",
        str(copy),
        "--threads",
        str(options.threads),
    ]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    if not worker.stdout.readline():
        raise SystemExit(f"the peers' process ended: {' '.join(command)}")
    return worker


def ask(worker: Any, **what: Any) -> Any:
    worker.stdin.write(json.dumps(what) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def rows_of(name: str) -> list[dict[str, Any]]:
    with gzip.open(Path(os.environ["EDGETUNE_DATASETS"]) / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def of_length(runtime: Any, options: argparse.Namespace) -> list[str]:
    """Different texts with exactly so many tokens, special ones included."""
    if options.texts:
        lines = options.texts.read_text(encoding="utf-8").splitlines()
        texts = dict.fromkeys(json.loads(line)["text"] for line in lines)
    else:
        texts = dict.fromkeys(row["sentence1"] for row in rows_of("stsb_en/test.jsonl.gz"))
    found = [text for text in texts if len(runtime.text_ids(text)) == options.tokens]
    if not found:
        raise SystemExit(f"no text of exactly {options.tokens} tokens")
    return found[: options.sentences]


def accuracy(embed: Callable[[list[str]], np.ndarray]) -> dict[str, float]:
    """Spearman of the cosine on STS-B (test), and accuracy of a logistic regression on
    Banking77.
    """
    from scipy.stats import spearmanr
    from sklearn.linear_model import LogisticRegression

    rows = rows_of("stsb_en/test.jsonl.gz")
    first, second = (
        unit(embed([row[side] for row in rows])) for side in ("sentence1", "sentence2")
    )
    found = {
        "stsb_spearman": float(
            spearmanr((first * second).sum(1), [row["score"] for row in rows]).statistic
        )
    }
    sides = [rows_of(f"banking77/{side}.jsonl.gz") for side in ("train", "test")]
    (x, y), (x_test, y_test) = (
        (unit(embed([row["text"] for row in side])), [row["label"] for row in side])
        for side in sides
    )
    classifier = LogisticRegression(C=10, max_iter=300).fit(x, y)
    return found | {"banking77_accuracy": float(classifier.score(x_test, y_test))}


def unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--adapter")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--sentences", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--texts", type=Path, help='rows with a "text"; default: STS-B test')
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve_peers(options.worker, options.threads)
        return
    if not options.peer_python:
        report(options, None, Path())
        return
    with tempfile.TemporaryDirectory() as folder:
        worker = start_worker(options, Path(folder))
        try:
            report(options, worker, Path(folder))
        finally:
            worker.stdin.close()
            worker.wait()


def report(options: argparse.Namespace, worker: Any, folder: Path) -> None:
    """Measure, print."""
    ours = Ours(options.bundle, options.adapter, options.threads)
    texts = of_length(ours.runtime, options)
    taken: dict[str, list[float]] = {}
    for turn in range(options.rounds):
        turns = [lambda: ours.times(texts)]
        turns += [] if worker is None else [lambda: ask(worker, times=texts)]
        for take in turns[:: -1 if turn % 2 else 1]:
            for kind, values in take().items():
                taken.setdefault(kind, []).extend(values)
    medians = {kind: statistics.median(values) for kind, values in taken.items()}
    print(
        f"| {len(texts)} sentences of {options.tokens} tokens, {options.threads} threads,"
        f" {options.rounds} rounds | p50 ms | p95 ms |\n|---|---|---|"
    )
    for kind, values in taken.items():
        print(f"| {kind} | {medians[kind]:.2f} | {np.percentile(values, 95):.2f} |")
    peers = [kind for kind in medians if not kind.startswith("edgetune")]
    ratios = {
        f"{mine} / {peer}": medians[mine] / medians[peer]
        for mine in medians
        if mine.startswith("edgetune")
        for peer in peers
        if mine.rpartition(",")[2] == peer.rpartition(",")[2]
    }
    for pair, ratio in ratios.items():
        print(f"{ratio:.2f} x  {pair}")
    rounds = {kind: [round(ms, 4) for ms in values] for kind, values in taken.items()}
    result: dict[str, Any] = {"benchmark": "encoder", "p50_ms": medians, "ratios": ratios}
    result |= {"samples_ms": rounds, "sentences": len(texts)}
    if options.accuracy:

        def theirs(texts: list[str]) -> np.ndarray:
            return np.asarray(np.load(ask(worker, encode=texts, to=str(folder / "embeddings.npy"))))

        result["accuracy"] = {
            "edgetune": accuracy(
                lambda texts: ours.runtime.embed(texts, normalize=False, truncate=True)
            ),
            "sentence-transformers": accuracy(theirs),
        }
        for side, figures in result["accuracy"].items():
            print(side, ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
