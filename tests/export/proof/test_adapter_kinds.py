"""Adapters of every kind and of other tools: added up, merged by PEFT, or refused with the reason;
never half used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from export_helpers import export, make_adapter
from runtime_helpers import peft_adapter, write_metadata
from safetensors.torch import load_file, save_file

from edgetune.adapters.folder import load_adapter, read_metadata
from edgetune.cli.export import command
from edgetune.core.answer_confidence import AnswerConfidence
from edgetune.core.errors import AdapterError, ExportError
from edgetune.core.layout import ADAPTER_METADATA
from edgetune.export.inputs.combine import Term, combine, resolve_sums
from edgetune.export.proof.torch_model import merge_adapter
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime.adapters.lora import read_lora
from edgetune.runtime.bundle.manifest import read_manifest

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(3, 40)[None]


def logits(base: Path, adapter: Path, *, merged: bool = False) -> torch.Tensor:
    model = load_adapter(load_body(resolve_base(str(base))), adapter)
    with torch.no_grad():
        return (merge_adapter(model, where="") if merged else model)(IDS).logits


def delta(folder: Path, module: str) -> Any:
    deltas = read_lora(folder).deltas
    return deltas[module][1] @ deltas[module][0] if module in deltas else 0.0


def test_a_sum_of_adapters_is_the_sum_of_their_changes(tiny_decoder: Path, tmp_path: Path) -> None:
    peft_adapter(
        tiny_decoder,
        tmp_path / "a",
        seed=1,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"down_proj": 3},
    )
    peft_adapter(
        tiny_decoder,
        tmp_path / "b",
        seed=2,
        r=7,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
    )
    combine([Term("a", tmp_path / "a", 1.0), Term("b", tmp_path / "b", -0.5)], tmp_path / "ab")
    for module in {*read_lora(tmp_path / "a").deltas, *read_lora(tmp_path / "b").deltas}:
        expected = delta(tmp_path / "a", module) - 0.5 * delta(tmp_path / "b", module)
        torch.testing.assert_close(
            torch.tensor(delta(tmp_path / "ab", module)),
            torch.tensor(expected),
            atol=1e-5,
            rtol=1e-5,
        )


def test_peft_opens_the_sum_and_answers_as_with_the_summed_weights(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    for i, name in enumerate("ab"):
        peft_adapter(
            tiny_decoder,
            tmp_path / name,
            seed=i,
            r=3 + i,
            target_modules=["q_proj", "down_proj"] if i else ["q_proj", "v_proj"],
        )
    combine([Term("a", tmp_path / "a", 0.7), Term("b", tmp_path / "b", 0.5)], tmp_path / "ab")
    model = load_body(resolve_base(str(tiny_decoder)))
    with torch.no_grad():
        for name, weight in (("a", 0.7), ("b", 0.5)):
            for module in read_lora(tmp_path / name).deltas:
                model.get_submodule(module).weight += weight * torch.tensor(
                    delta(tmp_path / name, module)
                )
        expected = model(IDS).logits
    torch.testing.assert_close(
        logits(tiny_decoder, tmp_path / "ab"), expected, atol=1e-4, rtol=1e-4
    )


def test_how_sure_and_how_small_an_adapter_is_says_nothing_of_a_sum(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    about = make_adapter(tiny_decoder, tmp_path / "a") / ADAPTER_METADATA
    sure = AnswerConfidence(slope=2.0, intercept=1.0).to_dict()
    about.write_text(json.dumps(json.loads(about.read_text()) | {"confidence": sure, "codes": {}}))
    combine([Term("a", tmp_path / "a", 0.5)], tmp_path / "half")
    found = read_metadata(tmp_path / "half")
    assert found["metrics"] == {"sum_of": {"a": 0.5}} and found["confidence"] is None
    assert "codes" not in found


def test_export_takes_sums_of_names_and_of_folders(tiny_decoder: Path, tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        make_adapter(tiny_decoder, tmp_path / name, seed=i, rank=2 + i)
    options = [
        "--adapter",
        f"a={tmp_path / 'a'}",
        "--adapter",
        f"ab=a+0.5*{tmp_path / 'b'}",
        "--precision",
        "fp32",
        "--out",
        str(tmp_path / "bundle"),
    ]
    result = CliRunner().invoke(command, [*options, "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "bundle")
    assert [entry.name for entry in manifest.adapters] == ["a", "ab"]
    assert manifest.adapters[1].metrics == {"sum_of": {"a": 1.0, str(tmp_path / "b"): 0.5}}
    assert all(proof["max_abs"] <= 1e-3 for proof in manifest.proof["adapters"].values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a+c", r"'c' is neither another adapter's name nor a folder .*expected a"),
        ("a+half*a", r"cannot read the factor of 'half\*a' .*got half"),
        ("a+", "'' is neither"),
    ],
)
def test_a_sum_that_cannot_be_read_says_where(
    tiny_decoder: Path, tmp_path: Path, value: str, message: str
) -> None:
    peft_adapter(tiny_decoder, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(ExportError, match=message):
        resolve_sums([("a", str(tmp_path / "a")), ("s", value)], tmp_path / "sums")


def test_a_folder_with_a_plus_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert resolve_sums([("x", str(tmp_path / "a+b"))], tmp_path / "sums") == [
        ("x", tmp_path / "a+b")
    ]


def test_heads_and_other_bases_are_not_added(
    tiny_encoder: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    peft_adapter(tiny_encoder, tmp_path / "head", labels=3, target_modules=["query"])
    with pytest.raises(AdapterError, match="task head cannot be added"):
        combine([Term("h", tmp_path / "head", 1.0)], tmp_path / "out")
    for name, digest in (("a", "a" * 64), ("b", "b" * 64)):
        peft_adapter(tiny_decoder, tmp_path / name, target_modules=["q_proj"])
        write_metadata(tmp_path / name, base={"name": name, "digest": f"sha256:{digest}"})
    with pytest.raises(
        AdapterError,
        match=r"different bases cannot be added.*expected a sha256:aaa.*got b sha256:bbb",
    ):
        combine([Term(n, tmp_path / n, 1.0) for n in "ab"], tmp_path / "out")
    peft_adapter(tiny_decoder, tmp_path / "dora", use_dora=True, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="DoRA"):
        combine([Term("dora", tmp_path / "dora", 1.0)], tmp_path / "out")


MERGEABLE: dict[str, dict[str, Any]] = {
    "trained tokens": {"trainable_token_indices": [3, 4, 5]},
    "trained biases": {"bias": "all"},
    "a saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "the token embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("name", MERGEABLE)
def test_what_inputs_cannot_express_is_refused_early_and_merges(
    name: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    expected = peft_adapter(tiny_decoder, tmp_path / "a", **MERGEABLE[name])
    with torch.no_grad():
        torch.testing.assert_close(logits(tiny_decoder, tmp_path / "a"), expected(IDS).logits)
    with pytest.raises(
        AdapterError, match=r"adapter inputs cannot take this adapter(.|\n)*--mode merged"
    ):
        from edgetune.export.bundle import export_bundle

        export_bundle([("a", tmp_path / "a")], tmp_path / "bundle", base_name=str(tiny_decoder))
    torch.testing.assert_close(
        logits(tiny_decoder, tmp_path / "a", merged=True),
        expected(IDS).logits,
        atol=2e-3,
        rtol=1e-3,
    )


def test_an_adapter_on_the_output_projection_gets_inputs_there(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    from edgetune.export.bundle import export_bundle

    peft_adapter(tiny_decoder, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    manifest = export_bundle(
        [("a", tmp_path / "a")],
        tmp_path / "bundle",
        base_name=str(tiny_decoder),
        threads=1,
        precision=Precision("fp32"),
    )
    torch.testing.assert_close(
        logits(tiny_decoder, tmp_path / "a", merged=True),
        logits(tiny_decoder, tmp_path / "a"),
        atol=2e-3,
        rtol=1e-3,
    )
    assert (
        "lm_head" in {site.name for site in manifest.sites}
        and manifest.proof["adapters"]["a"]["max_abs"] <= 1e-3
    )


def test_a_merge_that_peft_refuses_is_one_line(tiny_decoder: Path, tmp_path: Path) -> None:
    from edgetune.export.bundle import export_bundle

    peft_adapter(tiny_decoder, tmp_path / "a", lora_bias=True)
    with pytest.raises(ExportError, match=r"PEFT cannot merge this adapter: .*lora_bias"):
        export_bundle(
            [("a", tmp_path / "a")], tmp_path / "bundle", mode="merged", base_name=str(tiny_decoder)
        )


def test_a_copy_of_another_embedding_is_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_decoder, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    copy = next(name for name in tensors if name.endswith("lm_head.base_layer.weight"))
    save_file({**tensors, copy: tensors[copy] + 1.0}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(AdapterError, match=r"not the base's own weight .*other values"):
        logits(tiny_decoder, tmp_path / "a")


UNSLOTH_TARGETS = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


def test_unsloths_configuration_and_unstripped_names_are_read(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    peft_adapter(tiny_decoder, tmp_path / "a")
    before, deltas = logits(tiny_decoder, tmp_path / "a"), read_lora(tmp_path / "a").deltas
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    extra = {
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers",
            "unsloth_fixed": True,
        }
    }
    (tmp_path / "a" / CONFIG).write_text(
        json.dumps({**config, **extra, "target_modules": UNSLOTH_TARGETS, "task_type": "CAUSAL_LM"})
    )
    tensors = {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(tmp_path / "a" / WEIGHTS).items()
    }
    save_file(
        {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()},
        tmp_path / "a" / WEIGHTS,
    )
    assert torch.equal(logits(tiny_decoder, tmp_path / "a"), before)
    assert read_lora(tmp_path / "a").deltas.keys() == deltas.keys()
    manifest = export(tmp_path / "bundle", make_adapter(tiny_decoder, tmp_path / "own", rank=2))
    from edgetune.runtime.adapters.packing import pack_adapter

    assert pack_adapter(tmp_path / "a", manifest).rank == 4


def test_a_sum_must_not_leave_its_folder_or_stand_twice(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'\.\./x' cannot be an adapter's name"):
        resolve_sums([("../x", "a+b")], tmp_path / "sums")
    with pytest.raises(ExportError, match="two adapters are named 'ab'"):
        resolve_sums([("ab", "a+b"), ("ab", "a+b")], tmp_path / "sums")
    assert not (tmp_path / "x").exists()
