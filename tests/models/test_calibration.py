"""Calibrated rounding: what a layer answers moves less than by rounding to nearest, and the file
holds what torch has, bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_helpers import AS_IT_IS, export, make_adapter
from family_helpers import make_family
from onnx import numpy_helper
from torch import Tensor
from training_helpers import recipe, sft_recipe, write_rows

from edgetune.core.errors import ExportError
from edgetune.data.loaders import load_examples
from edgetune.export.bundle import export_bundle
from edgetune.export.graph.adapter_branch import adapted_graph
from edgetune.export.inputs.calibration_text import check_quantiser, file_rows, recipe_rows
from edgetune.export.inputs.sources import read_source
from edgetune.export.proof.probe import probe_rows
from edgetune.models.calibration import calibrate
from edgetune.models.fake_quantise import round_weights
from edgetune.models.load import load_body, load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.blocks import quantise
from edgetune.quantisation.gptq import round_to_inputs
from edgetune.quantisation.hqq import half_quadratic_steps
from edgetune.quantisation.precision import Precision, shipped_precision, trained_precision
from edgetune.recipe.read import recipe_to_toml
from edgetune.runtime.adapters.trained_for import other_weights
from edgetune.runtime.bundle.manifest import Manifest, read_manifest


def correlated(columns: int, count: int = 1000) -> Tensor:
    """Inputs whose columns go together and are of very different sizes, as in a transformer."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    return (
        torch.randn(count, columns, generator=generator)
        @ mix
        * (0.1 + 3 * torch.rand(columns, generator=generator))
    )


def moved(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    """Relative squared error of x Wᵀ."""
    return float((x @ (rounded - weight).t()).square().sum() / (x @ weight.t()).square().sum())


def random_weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("columns", [96, 80])
def test_on_correlated_inputs_the_output_moves_less_than_half_as_far(columns: int) -> None:
    weight, x, fresh = (
        random_weight(64, columns),
        correlated(columns)[:700],
        correlated(columns)[700:],
    )
    rounded = round_to_inputs(weight, x.t() @ x, bits=4, block_size=32)
    nearest = quantise(weight, bits=4).dequantise()
    assert moved(weight, rounded, fresh) < 0.6 * moved(weight, nearest, fresh)


def test_the_result_lies_on_a_grid_that_is_stored_bit_for_bit() -> None:
    weight, x = random_weight(64, 96) * 1e-3, correlated(96)
    rounded = round_to_inputs(weight, x.t() @ x, bits=4, block_size=32)
    stored = quantise(rounded, bits=4)
    assert torch.equal(stored.dequantise(), rounded) and stored.inputs == stored.columns
    assert stored.zeros is None  # so that the file and the engine need none


def test_gptq_is_what_its_paper_says_column_by_column() -> None:
    """Equation 2 solved anew for the columns that are still free (optimal brain surgeon), without
    any of the paper's shortcuts.
    """
    weight, x = random_weight(8, 32), correlated(32)
    gram = (x.t() @ x).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    rounded = round_to_inputs(weight, gram.float(), bits=4, block_size=32)
    stored = quantise(rounded, bits=4)
    left, free = weight.double(), torch.argsort(gram.diagonal(), descending=True).tolist()
    while free:
        at = free[0]
        inverse = torch.linalg.inv(damped[free][:, free])
        lost = (left[:, at] - rounded[:, at].double()) / inverse[0, 0]
        steps = (left[:, at] / stored.scales[:, 0].double()).clamp(-8, 7)
        assert (
            (steps - rounded[:, at].double() / stored.scales[:, 0].double()).abs() < 0.501
        ).all()
        left[:, free] -= lost[:, None] * inverse[0][None]
        free = free[1:]


def heavy_tailed() -> Tensor:
    """Most weights near zero, one in each block far out."""
    weight = random_weight(64, 256)
    weight[:, 7::32] *= 6
    return weight


def test_hqq_serves_the_many_weights_better_than_the_few() -> None:
    weight = heavy_tailed()
    nearest, searched = (
        quantise(weight, bits=4, symmetric=False, method=method).dequantise()
        for method in ("rtn", "hqq")
    )
    size = [
        (rounded - weight).abs().pow(0.7).view(64, 8, 32).sum(-1) for rounded in (nearest, searched)
    ]
    assert (size[1] <= size[0] * 1.0001).all() and size[1].sum() < 0.995 * size[0].sum()


def test_hqq_takes_a_step_and_a_zero_from_the_weights_that_are_not_forgiven() -> None:
    """One round by hand: the errors beyond half a step leave the fit (HQQ, equations 3 and 4)."""
    weight = heavy_tailed().view(64, 8, 32)
    scale, zero = torch.full((64, 8), 0.03), torch.full((64, 8), 7.0)
    values = torch.round(weight / 0.03 + 7).clamp(0, 15)
    error = (weight - (values - 7) * 0.03) / 0.03
    forgiven = error.sign() * (
        error.abs() - error.abs().clamp(min=1e-6) ** (0.7 - 1) * 0.5 ** (2 - 0.7)
    ).clamp(min=0)
    assert ((forgiven != 0) == (error.abs() > 0.5)).all()
    wanted = weight - forgiven * 0.03
    by_hand = (values - wanted / 0.03).mean(-1).round().clamp(0, 15)
    fitted = (wanted * (values - by_hand[..., None])).sum(-1) / (
        values - by_hand[..., None]
    ).square().sum(-1)
    new_scale, new_zero = half_quadratic_steps(weight, scale, zero, rounds=1)
    taken = new_scale != 0.03
    assert taken.float().mean() > 0.5
    torch.testing.assert_close(new_scale[taken], fitted[taken])
    assert torch.equal(new_zero[taken], by_hand[taken])


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_every_method_keeps_a_grid_as_it_is(method: str) -> None:
    weight = torch.randint(-8, 8, (16, 96), generator=torch.Generator().manual_seed(0)) * 0.0625
    assert torch.equal(quantise(weight, bits=4, method=method).dequantise(), weight)
    assert torch.equal(
        quantise(heavy_tailed(), bits=8, method=method).dequantise(),
        quantise(heavy_tailed(), bits=8).dequantise(),
    )


def test_rows_that_lie_on_a_grid_are_not_touched() -> None:
    weight, x = random_weight(64, 96), correlated(96)
    weight[10:20] = torch.randint(-8, 8, (10, 96)) * 0.0625
    rounded = round_to_inputs(weight, x.t() @ x, bits=4, block_size=32)
    assert torch.equal(rounded[10:20], weight[10:20]) and not torch.equal(rounded[20:], weight[20:])
    assert torch.equal(
        round_to_inputs(weight[10:20], x.t() @ x, bits=4, block_size=32),
        weight[10:20],
    )


def test_inputs_that_never_occur_do_no_harm() -> None:
    weight, x = random_weight(16, 64), correlated(64)
    x[:, 5], x[:, 40:] = 0, 0
    rounded = round_to_inputs(weight, x.t() @ x, bits=4, block_size=32)
    never = (rounded - weight)[:, [5, *range(40, 64)]].abs()
    assert torch.isfinite(rounded).all() and never.max() < 0.1 < weight.abs().max()
    assert torch.isfinite(round_to_inputs(weight, torch.zeros(64, 64), bits=4, block_size=32)).all()


def test_a_base_that_lies_on_its_grid_is_left_as_it_is_without_running_it(
    tiny_decoder: Path,
) -> None:
    model, said = load_body(resolve_base(str(tiny_decoder))), list[str]()
    with torch.no_grad():
        for layer in model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_((layer.weight * 16).round().clamp(-8, 7) / 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, [], Precision("int4"), say=said.append)
    assert "nothing to calibrate" in said[0] and all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()
    )


def correlate(base: Path) -> Path:
    """Token embeddings in few directions, so that what layers read is correlated, as in a trained
    model.
    """
    model = load_body(resolve_base(str(base)))
    generator, table = torch.Generator().manual_seed(2), model.get_input_embeddings().weight
    with torch.no_grad():
        low_rank = torch.randn(table.shape[0], 8, generator=generator) @ torch.randn(
            8, table.shape[1], generator=generator
        )
        table.copy_(0.03 * low_rank + 0.003 * torch.randn(table.shape, generator=generator))
    model.save_pretrained(base)
    return base


def rows_for(count: int = 72) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, 300, (12 + i % 9,), generator=generator).tolist() for i in range(count)
    ]


def divergence(model: Any, reference: Any, rows: list[list[int]]) -> float:
    """Mean squared difference of the last hidden states."""
    total = 0.0
    with torch.no_grad():
        for row in rows:
            ours, theirs = (
                m.base_model(input_ids=torch.tensor([row])).last_hidden_state
                for m in (model, reference)
            )
            total += float((ours - theirs).square().mean())
    return total / len(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bert", "modernbert"])
def test_a_calibrated_model_answers_closer_to_the_original_than_one_rounded_to_nearest(
    family: str, tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    encoder = family in ("bert", "modernbert")
    base = resolve_base(
        str(
            correlate(
                make_family(family, tiny_encoder if encoder else tiny_decoder, tmp_path / "base")
            )
        )
    )
    original, calibrated = load_body(base), load_body(base)
    precision = shipped_precision("int4", base.kind)
    rows = rows_for()
    calibrate(calibrated, rows[:64], precision)
    nearest = load_body(base)
    round_weights(nearest, precision)
    round_weights(calibrated, precision)  # the embedding, and nothing of what was calibrated
    assert divergence(calibrated, original, rows[64:]) < 0.8 * divergence(
        nearest, original, rows[64:]
    )


@pytest.fixture(scope="module")
def run(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its recipe, so that its rows are at hand."""
    folder = tmp_path_factory.mktemp("run")
    base = correlate(shutil.copytree(tiny_decoder, folder / "base"))
    make_adapter(base, folder / "adapter", strength=0.5)
    (folder / "recipe.toml").write_text(recipe_to_toml(sft_recipe(base, folder)))
    return folder


@dataclass(frozen=True)
class Bundle:
    """A bundle, what was said while it was written, and its manifest."""

    folder: Path
    said: list[str]
    manifest: Manifest


@pytest.fixture(scope="module")
def bundles(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The same adapter and base, rounded by each quantiser."""
    made = {}
    for quantiser in ("rtn", "hqq", "gptq"):
        folder, said = tmp_path_factory.mktemp(quantiser) / "b", list[str]()
        manifest = export_bundle(
            [("a", run)],
            folder,
            precision=Precision("int4", quantiser=quantiser),
            threads=1,
            task=AS_IT_IS,
            say=said.append,
        )
        made[quantiser] = Bundle(folder, said, manifest)
    return made


def engine_graph(bundle: Path) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """The nodes that run when an adapter is active, and every stored tensor by its name."""
    model = onnx.load(str(bundle / "engine.onnx"))
    return list(adapted_graph(model).node), {
        tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
    }


def stored_weights(bundle: Bundle) -> dict[str, Tensor]:
    """Site → the weight (out, in) that the bytes of the file mean, read without edgetune's
    quantiser.
    """
    nodes, arrays = engine_graph(bundle.folder)
    makers = {name: node for node in nodes for name in node.output}
    found = {}
    for site in bundle.manifest.sites:
        (added,) = [node for node in nodes if node.name == f"{site.name}.adapted"]
        octets, scales, *zeros = (arrays[name] for name in makers[added.input[0]].input[1:])
        assert len(zeros) == (bundle.manifest.precision.quantiser == "hqq")
        zero = (
            np.full(scales.shape, 8)
            if not zeros
            else np.stack([zeros[0] & 15, zeros[0] >> 4], -1).reshape(len(scales), -1)
        )
        values = (
            np.stack([octets & 15, octets >> 4], -1).reshape(*scales.shape, 32).astype(np.float32)
            - zero[:, : scales.shape[1], None]
        )
        found[site.name] = torch.from_numpy(
            (values * scales[..., None]).reshape(len(values), -1).astype(np.float32)
        )
    return found


def in_torch(run: Path, quantiser: str) -> Any:
    """The base as torch has it for a bundle of this quantiser."""
    base = resolve_base(str(run / "base"))
    precision = replace(shipped_precision("int4", "decoder"), quantiser=quantiser)
    if quantiser == "hqq":
        return load_body(replace(base, precision=precision))
    model = load_body(base)
    calibrate(model, recipe_rows([read_source("a", run)], load_tokenizer(base), base), precision)
    return model


@pytest.mark.parametrize("quantiser", ["hqq", "gptq"])
def test_the_file_holds_what_torch_has_bit_for_bit(
    quantiser: str, run: Path, bundles: dict[str, Bundle]
) -> None:
    bundle, model = bundles[quantiser], in_torch(run, quantiser)
    assert (
        bundle.manifest.precision.quantiser == quantiser
        and read_manifest(bundle.folder).precision == bundle.manifest.precision
    )
    stored = stored_weights(bundle)
    assert len(stored) == 8
    for site in bundle.manifest.sites:
        assert torch.equal(
            stored[site.name],
            torch.cat([model.get_submodule(part.module).weight for part in site.parts]),
        )


def test_what_keep_says_of_a_layer_holds_for_all_of_its_product_when_it_is_calibrated(
    run: Path, tmp_path: Path
) -> None:
    export_bundle(
        [("a", run)],
        tmp_path / "b",
        precision=Precision("int4", overrides={"q_proj": "int8"}, quantiser="gptq"),
        threads=1,
        task=AS_IT_IS,
    )
    nodes, arrays = engine_graph(tmp_path / "b")
    node = next(
        node
        for node in nodes
        if "q_proj+k_proj+v_proj" in node.name and node.op_type == "MatMulNBits"
    )
    octets, scales = (arrays[name] for name in node.input[1:3])
    stored = (
        (octets.astype(np.float32) - 128).reshape(*scales.shape, -1) * scales[..., None]
    ).reshape(len(scales), -1)
    attention = load_body(resolve_base(str(run / "base"))).model.layers[0].self_attn
    weight = torch.cat(
        [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    ).detach()
    torch.testing.assert_close(torch.from_numpy(stored), quantise(weight, bits=8).dequantise())


def test_a_calibrated_bundle_is_closer_than_a_plain_one(bundles: dict[str, Bundle]) -> None:
    kl = {
        quantiser: bundle.manifest.proof["adapters"]["a"]["mean_kl"]
        for quantiser, bundle in bundles.items()
    }
    assert kl["gptq"] < 0.8 * kl["rtn"] and math.isfinite(kl["hqq"])
    assert any(line.startswith("calibrating on ") for line in bundles["gptq"].said)


def test_an_adapter_that_learned_on_the_rounded_base_is_told_that_this_one_is_rounded_otherwise(
    bundles: dict[str, Bundle],
) -> None:
    recorded = shipped_precision("int4", "decoder").to_dict()
    assert other_weights(recorded, bundles["rtn"].manifest.precision) == ""
    line = other_weights(recorded, bundles["gptq"].manifest.precision)
    assert "this one is int4 (blocks of 32, rounded by gptq, lm_head int8)" in line
    assert "export with --precision int4 --quantiser rtn to ship" in line
    own = replace(shipped_precision("int4", "decoder"), quantiser="hqq")
    assert (
        trained_precision(own.to_dict(), where="a") == own
        and other_weights(own.to_dict(), bundles["hqq"].manifest.precision) == ""
    )


def test_a_merge_rounded_by_hqq_is_proven_against_the_base_rounded_by_hqq(
    run: Path, tmp_path: Path
) -> None:
    manifest = export_bundle(
        [("a", run)],
        tmp_path / "b",
        mode="merged",
        precision=Precision("int4", quantiser="hqq"),
        threads=1,
        task=AS_IT_IS,
    )
    assert manifest.proof["adapters"]["a"]["survived"]["strength"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"precision": Precision("int8", quantiser="gptq")}, "4-bit weights, and there are none"),
        (
            {"precision": Precision("int4", quantiser="awq")},
            "unknown quantiser.*rtn, hqq, gptq.*awq",
        ),
        (
            {"precision": Precision("int4", quantiser="gptq"), "mode": "merged"},
            "merged.*--quantiser hqq",
        ),
        ({"precision": Precision("int4"), "calibration": Path("text.txt")}, "only gptq reads text"),
    ],
)
def test_what_cannot_be_calibrated_is_said_before_anything_is_loaded(
    run: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ExportError, match=match):
        export_bundle([("a", run)], tmp_path / "b", **options)


def test_what_cannot_be_separate_is_not_sent_there() -> None:
    for swaps, fix in (
        (True, "Use --quantiser hqq, or --mode separate."),
        (False, "Use --quantiser hqq."),
    ):
        with pytest.raises(ExportError) as caught:
            check_quantiser(
                Precision("int4", quantiser="gptq"), mode="merged", calibration=None, swaps=swaps
            )
        assert caught.value.fix == fix


def test_rows_of_a_run_are_read_as_training_read_them(tiny_encoder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_encoder, tmp_path / "adapter")  # its labels: low, high, none
    train = write_rows(
        tmp_path / "train.jsonl",
        [
            {"text": f"turn on light {n} " * (n + 1), "label": ("low", "none")[n % 2]}
            for n in range(9)
        ],
    )
    settings = recipe(tiny_encoder, "sequence-classification", train, None)
    stage, base = settings.stage[0], resolve_base(str(tiny_encoder))
    tokenizer = load_tokenizer(base)
    held = replace(settings, stage=(replace(stage, data=replace(stage.data, hold_out=3)),), seed=5)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(held))
    expected = load_examples(held.stage[0], tokenizer, base, seed=5)
    assert len(expected.validation) == 3 and len(expected.train) == 6
    assert probe_rows(adapter, tokenizer, base) == [
        example.input_ids[:64] for example in expected.validation
    ]
    calibrated = recipe_rows([read_source("a", adapter)], tokenizer, base)
    assert sorted(calibrated) == sorted(example.input_ids for example in expected.train)
    high = write_rows(tmp_path / "dev.jsonl", [{"text": "a new label", "label": "high"}])
    (tmp_path / "recipe.toml").write_text(
        recipe_to_toml(
            replace(
                settings, stage=(replace(stage, data=replace(stage.data, validation=str(high))),)
            )
        )
    )
    assert probe_rows(adapter, tokenizer, base) == [tokenizer("a new label")["input_ids"]]


def test_without_text_gptq_says_what_to_give(tiny_decoder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a")
    with pytest.raises(ExportError, match="Give --calibration FILE"):
        export(tmp_path / "b", adapter, precision="int4", quantiser="gptq")


def test_texts_of_a_file_are_cut_into_pieces(tiny_decoder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_decoder)))
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"text": "hello " * 2000})
        + "\n"
        + json.dumps({"prompt": "a", "completion": "b"})
        + "\n"
    )
    pieces = file_rows(tmp_path / "t.jsonl", tokenizer)
    assert (
        len(pieces) > 2
        and max(map(len, pieces)) == 512
        and tokenizer.decode(pieces[0]).startswith("hello hello")
    )
