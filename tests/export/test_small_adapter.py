"""Adapters made small: what is kept of them, and that everything which reads one reads the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import AS_IT_IS, make_adapter
from peft import PeftModel
from runtime_helpers import engines_here
from safetensors.numpy import load_file, save_file

from edgetune.adapters.folder import load_adapter
from edgetune.compression.compress import decompress
from edgetune.core.adapter_codes import Coded
from edgetune.core.errors import AdapterError, ExportError
from edgetune.core.files import sha256_file
from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_METADATA, ADAPTER_WEIGHTS
from edgetune.export.bundle import export_bundle
from edgetune.export.inputs.small_adapter import (
    Factors,
    Spectrum,
    factors_of,
    kept_effect,
    mean_rank,
    ranks_within,
    read_whole,
    round_factors,
    small_adapter,
    spectra_of,
    write_plain,
    write_rounded,
    write_small,
)
from edgetune.export.proof.prove import reprove
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime import Runtime
from edgetune.runtime.adapters.lora import read_lora
from edgetune.runtime.bundle.manifest import read_manifest

IDS = torch.tensor([[5, 9, 30, 31, 7, 100, 12]])


@pytest.fixture(scope="module")
def trained(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_decoder, tmp_path_factory.mktemp("trained") / "a")


@pytest.fixture(scope="module")
def small(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 2 ranks in the mean, in 4 bits."""
    read = read_whole(trained)
    spectra = spectra_of(read)
    folder = tmp_path_factory.mktemp("small") / "a"
    ranks = ranks_within(spectra, 2)
    write_small(small_adapter(read, factors_of(spectra, ranks), 4), folder)
    return folder


def product(own: Factors) -> torch.Tensor:
    return own.b @ own.a


def test_a_rank_is_cut_as_a_singular_value_decomposition_cuts_it(trained: Path) -> None:
    read = read_whole(trained)
    spectra = spectra_of(read)
    cut = factors_of(spectra, dict.fromkeys(spectra, 2))
    for module, (a, b) in read.deltas.items():
        whole = torch.from_numpy(b @ a)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        assert torch.allclose(product(spectra[module]), whole, atol=1e-5)
        assert torch.allclose(product(cut[module]), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
        assert torch.allclose(spectra[module].values, s[: len(spectra[module].values)], atol=1e-4)


def test_ranks_go_where_singular_values_are_within_the_bytes() -> None:
    def spectrum(values: list[float]) -> Spectrum:
        return Spectrum(torch.ones(4, 8), torch.ones(8, 4), torch.tensor(values))

    spectra = {"strong": spectrum([9.0, 8, 7, 6]), "weak": spectrum([1.0, 0.1, 0.1, 0.1])}
    assert ranks_within(spectra, 2) == {"strong": 3, "weak": 1}
    assert ranks_within(spectra, 4) == {"strong": 4, "weak": 4}
    assert ranks_within(spectra, 1) == {"strong": 1, "weak": 1}


def test_more_bits_keep_more(trained: Path) -> None:
    whole = spectra_of(read_whole(trained))
    kept = [kept_effect(whole, round_factors(whole, bits)) for bits in (2, 3, 4, 8)]
    assert kept == sorted(kept) and kept[0] > 0.6 and 0.999 < kept[3] < 1
    expected = 1 - sum(
        float((product(whole[m]) - product(own)).square().sum())
        for m, own in round_factors(whole, 2).items()
    ) / sum(float(product(own).square().sum()) for own in whole.values())
    assert kept[0] == pytest.approx(expected, abs=1e-5)


def test_the_runtime_reads_the_numbers_that_the_codes_stand_for(trained: Path, small: Path) -> None:
    read = read_lora(small)
    assert read.problems == [] and read.coded
    spectra = spectra_of(read_whole(trained))
    rounded = round_factors(factors_of(spectra, ranks_within(spectra, 2)), 4)
    assert mean_rank(rounded) == pytest.approx(2, abs=0.1)
    for module, (a, b) in read.deltas.items():
        assert np.array_equal(a, rounded[module].a.numpy())
        assert np.array_equal(b, rounded[module].b.numpy())


def test_torch_and_peft_compute_with_the_same_numbers(
    tiny_decoder: Path, small: Path, tmp_path: Path
) -> None:
    base = resolve_base(str(tiny_decoder))
    write_plain(read_whole(small), tmp_path / "plain")
    with torch.no_grad():
        ours = load_adapter(load_body(base), small)(IDS).logits
        plain = PeftModel.from_pretrained(load_body(base), str(tmp_path / "plain"))(IDS).logits
        alone = load_body(base)(IDS).logits
    assert torch.equal(ours, plain) and not torch.allclose(ours, alone, atol=1e-2)


def test_peft_refuses_codes_with_the_way_out(tiny_decoder: Path, small: Path) -> None:
    body = load_body(resolve_base(str(tiny_decoder)))
    with pytest.raises((KeyError, ValueError), match="edgetune decompress"):
        PeftModel.from_pretrained(body, str(small))


def test_a_head_comes_along_in_8_bits(tiny_encoder: Path, tmp_path: Path) -> None:
    read = read_whole(make_adapter(tiny_encoder, tmp_path / "a"))
    write_small(small_adapter(read, spectra_of(read), 3), tmp_path / "small")
    again = read_lora(tmp_path / "small")
    assert set(again.head) == set(read.head) and again.problems == []
    weight = read.head["classifier.weight"]
    assert np.abs(again.head["classifier.weight"] - weight).max() < np.abs(weight).max() / 200
    assert json.loads((tmp_path / "small" / ADAPTER_METADATA).read_text())["codes"] == {
        "bits": 3,
        "head_bits": 8,
    }


def _rename(folder: Path, key: str, **tensors: np.ndarray) -> None:
    held = load_file(folder / ADAPTER_WEIGHTS)
    own = held.pop(next(name for name in held if name.endswith(key)))
    save_file(held | {name: tensors.get(name, own) for name in tensors}, folder / ADAPTER_WEIGHTS)
    metadata = json.loads((folder / ADAPTER_METADATA).read_text())
    metadata["files"][ADAPTER_WEIGHTS] = sha256_file(folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_METADATA).write_text(json.dumps(metadata))


def test_hostile_codes_are_problems_of_one_line_each(small: Path, tmp_path: Path) -> None:
    one = Coded("model.layers.0.self_attn.q_proj", 2, (9_999_999, 9_999_999))
    infinite = Coded("model.layers.0.self_attn.q_proj", 4, (64, 64))
    codes = np.zeros((1, 64), np.uint8)
    rows = infinite.encode([(codes, np.array([np.inf], np.float32))] * 2)
    cases = {
        "expected (rows,": {one.key: np.zeros((1, 9), np.uint8)},
        "NaN or infinite": {infinite.key: rows},
        "there twice": {
            infinite.key: rows,
            f"base_model.model.{infinite.name}.lora_A.weight": np.zeros((1, 64), np.float32),
        },
        "unknown": {"model.layers.0.mystery.lora.4bit.64x64": rows},
    }
    for at, (says, tensors) in enumerate(cases.items()):
        folder = tmp_path / str(at)
        shutil.copytree(small, folder)
        _rename(folder, "0.self_attn.q_proj.lora.4bit.64x64", **tensors)
        read = read_lora(folder)
        if says == "unknown":  # a module that no graph has: `pack_adapter` says so
            assert "model.layers.0.mystery" in read.deltas
            continue
        assert any(says in line and "\n" not in line for line in read.problems), read.problems


def test_codes_count_as_the_numbers_they_become(small: Path) -> None:
    read = read_lora(small, max_bytes=(small / ADAPTER_WEIGHTS).stat().st_size)
    assert any("expected at most" in line for line in read.problems)


def test_a_later_layout_is_refused_by_torch_and_by_the_runtime(
    tiny_decoder: Path, small: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "later"
    shutil.copytree(small, folder)
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, "edgetune_codes": 2}))
    assert any("a newer edgetune reads it" in line for line in read_lora(folder).problems)
    with pytest.raises(AdapterError, match="a newer edgetune reads it"):
        load_adapter(load_body(resolve_base(str(tiny_decoder))), folder)


@pytest.fixture(scope="module")
def bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 bundle whose adapter is rounded to 4 bits on the way."""
    out = tmp_path_factory.mktemp("bundles") / "b"
    export_bundle(
        [("a", trained)],
        out,
        precision=Precision("int8"),
        threads=1,
        task=AS_IT_IS,
        adapter_precision="int4",
    )
    return out


def test_an_adapter_is_proven_as_it_ships(trained: Path, bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.quality["adapter_precision"] == "int4"
    stored = bundle / "adapters" / "a"
    assert read_lora(stored).coded and not read_lora(trained).coded
    size = (stored / ADAPTER_WEIGHTS).stat().st_size
    assert size < (trained / ADAPTER_WEIGHTS).stat().st_size / 3
    shipped = next(iter(manifest.proof["adapters"].values()))
    again = reprove(bundle, manifest, threads=1)["onnxruntime"]["a"]
    # here the codes are both sides: what rounding them cost was in the first proof
    assert again.passed and again.mean_kl < shipped["mean_kl"]


def test_codes_ship_as_they_are_beside_an_adapter_that_is_rounded(
    trained: Path, small: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    both = [("whole", trained), ("small", small)]
    export_bundle(
        both, tmp_path / "b", threads=1, task=AS_IT_IS, adapter_precision="int8", say=said.append
    )
    shipped = tmp_path / "b" / "adapters"
    assert read_lora(shipped / "whole").coded
    codes = [folder / ADAPTER_WEIGHTS for folder in (shipped / "small", small)]
    assert codes[0].read_bytes() == codes[1].read_bytes()
    assert "small: in codes already, so it ships as it is" in said


def test_a_head_by_itself_finds_its_way_back(tiny_encoder: Path, tmp_path: Path) -> None:
    read = read_whole(make_adapter(tiny_encoder, tmp_path / "a"))
    write_plain(replace(read, deltas={}), tmp_path / "head")
    write_rounded(tmp_path / "head", tmp_path / "coded", "int8")
    decompress(tmp_path / "coded", tmp_path / "plain")
    coded, plain = read_lora(tmp_path / "coded"), read_lora(tmp_path / "plain")
    assert not plain.coded and plain.problems == [] and plain.deltas == {}
    assert all((plain.head[name] == coded.head[name]).all() for name in coded.head)


def test_a_bias_that_fp16_has_no_number_for_keeps_its_value(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    read = read_whole(make_adapter(tiny_encoder, tmp_path / "a"))
    prices = {**read.head, "classifier.bias": np.array([120_000.0, 1.5, 0.0], np.float32)}
    write_small(small_adapter(replace(read, head=prices), spectra_of(read), 4), tmp_path / "small")
    again = read_lora(tmp_path / "small")
    assert again.problems == [] and again.head["classifier.bias"].tolist() == [120_000.0, 1.5, 0.0]


def test_a_small_adapter_loads_beside_others_in_both_engines(
    bundle: Path, small: Path, trained: Path
) -> None:
    for engine in engines_here():
        with Runtime.open(bundle, threads=1, engine=engine) as runtime:
            runtime.load_adapter("small", small)
            runtime.load_adapter("whole", trained)
            texts = runtime.generate(
                ["hello"] * 3, adapters=["small", "whole", None], max_new_tokens=4
            )
            assert len({text.text for text in texts}) > 1
            runtime.unload_adapter("small")


def test_what_cannot_be_rounded_is_one_line(trained: Path, small: Path, tmp_path: Path) -> None:
    def ship(folder: Path, precision: str, mode: str = "separate") -> None:
        export_bundle([("a", folder)], tmp_path / "b", mode=mode, adapter_precision=precision)

    with pytest.raises(ExportError, match="expected fp32, fp16, int8"):
        ship(trained, "int5")
    with pytest.raises(ExportError, match="no adapter of its own"):
        ship(trained, "int4", "merged")
    with pytest.raises(AdapterError, match="in codes already"):
        ship(small, "int4")
    with pytest.raises(AdapterError, match="too large for fp16"):
        read = read_whole(trained)
        large = {module: (a * 1e6, b) for module, (a, b) in read.deltas.items()}
        write_plain(replace(read, deltas=large), tmp_path / "large")
        write_rounded(tmp_path / "large", tmp_path / "out", "fp16")
