"""`model.onnx` for other engines: padding on either side, and what it refuses before the trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import decoder_feed, export, make_adapter, plain_session
from transformers import LlamaForCausalLM

from edgetune.core.errors import ExportError
from edgetune.export.bundle import export_bundle

ROWS = ([5, 6, 7, 8, 9], [10, 11, 12])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_that_is_padded_on_either_side_gets_the_logits_of_torch(
    side: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    manifest = export(tmp_path / "b", make_adapter(tiny_decoder, tmp_path / "a", rank=2))
    longest = max(map(len, ROWS))
    pads = [[0] * (longest - len(row)) for row in ROWS]
    left = side == "left"
    ids = np.array([p + r if left else r + p for p, r in zip(pads, ROWS, strict=True)], np.int64)
    ones = [[1] * len(row) for row in ROWS]
    mask = np.array([p + o if left else o + p for p, o in zip(pads, ones, strict=True)], np.int64)
    logits = plain_session(tmp_path / "b").run(["logits"], decoder_feed(manifest, ids, mask))[0]
    model = LlamaForCausalLM.from_pretrained(tiny_decoder).eval()
    for row, found in zip(ROWS, logits, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(found[-1], alone[-1], atol=1e-3)


def test_a_head_size_that_the_operator_does_not_take_is_one_line(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_decoder, base)
    config = json.loads((base / "config.json").read_text()) | {"head_dim": 20}
    (base / "config.json").write_text(json.dumps(config))
    from transformers import LlamaConfig

    LlamaForCausalLM(LlamaConfig.from_pretrained(base)).save_pretrained(base)
    with pytest.raises(ExportError, match="head_dim 20"):
        export_bundle([], tmp_path / "b", base_name=str(base))
    assert not (tmp_path / "b").exists()
