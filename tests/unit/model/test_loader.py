"""Folders, shards and GGUF files give the same model; broken ones give an error that names what is broken."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from winnow.errors import CorruptBlock, InvalidRequest, UnknownName, Unsupported, WinnowError
from winnow.types import Message
from winnow.workers.model.fingerprint import remember_digests
from winnow.workers.model.loader import LoadedModel, auto_dtype, load_model, load_tokenizer, model_name
from winnow.workers.model.reference import DenseBackend
from winnow.workers.model.tiny import make_tiny_model

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not put the test's folder on the path
from gguf_writing import write_gguf

Tiny = Callable[..., Path]


def load(source: Path, **options: Any) -> LoadedModel:
    return load_model(str(source), **{"dtype": "fp32", "device": "cpu", **options})


def logits(model: LoadedModel, n_tokens: int = 100) -> Tensor:
    tokens = torch.randint(0, 290, (n_tokens,), generator=torch.Generator().manual_seed(0))
    backend = DenseBackend(model.spec, n_tokens, model.decoder.dtype)
    return model.decoder.logits(model.decoder.forward(tokens, torch.arange(n_tokens), backend))


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def shard(folder: Path) -> None:
    """Split model.safetensors in two with an index, as save_pretrained does with large models."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def refusal(source: Path, kind: type[WinnowError], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(source, **options)
    assert "/" not in str(caught.value).replace("org/name", ""), "a message never holds a path"
    return str(caught.value)


def test_a_sharded_folder_equals_a_single_file(tiny: Tiny, copy: Path) -> None:
    shard(copy)
    assert torch.equal(logits(load(copy)), logits(load(tiny("llama"))))


def test_a_multimodal_gemma3_folder_gives_its_text_model(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("gemma3"), tmp_path / "model"))
    text = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    weights = load_file(folder / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(folder)), logits(load(tiny("gemma3"))))


def test_weights_do_not_depend_on_the_file_after_loading(copy: Path) -> None:
    model = load(copy)
    before = logits(model)
    (copy / "model.safetensors").write_bytes(b"")
    assert torch.equal(logits(model), before)


def test_progress_reaches_the_total(copy: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    load(copy, on_progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert seen == [("load", 1, 2), ("load", 2, 2)]


class TestFingerprint:
    def test_the_tokenizer_alone_gives_the_same(self, copy: Path) -> None:
        model = load(copy)
        tokenizer, spec, fingerprint = load_tokenizer(str(copy))
        assert fingerprint == model.fingerprint
        assert spec == model.spec
        assert tokenizer.encode("abc") == model.tokenizer.encode("abc")
        assert model.tokenizer.eos_ids == (2, 0)

    def test_one_changed_bit_anywhere_changes_it(self, copy: Path) -> None:
        before = load_tokenizer(str(copy))[2]
        data = bytearray((copy / "model.safetensors").read_bytes())
        for position in (len(data) - 1, len(data) // 2):
            data[position] ^= 1
            (copy / "model.safetensors").write_bytes(data)
            changed = load_tokenizer(str(copy))[2]
            assert changed != before
            before = changed

    def test_config_tokenizer_and_number_of_layers_change_it(self, copy: Path) -> None:
        seen = {load(copy).fingerprint, load(copy, n_layers=1).fingerprint}
        with (copy / "chat_template.jinja").open("a") as stream:
            stream.write(" ")
        seen.add(load(copy).fingerprint)
        config = json.loads((copy / "config.json").read_bytes()) | {"rms_norm_eps": 1e-5}
        (copy / "config.json").write_text(json.dumps(config))
        seen.add(load(copy).fingerprint)
        assert len(seen) == 4

    def test_dtype_and_order_of_config_keys_do_not_change_it(self, copy: Path) -> None:
        before = load(copy).fingerprint
        config = json.loads((copy / "config.json").read_bytes())
        (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
        assert load(copy, dtype="bf16").fingerprint == before

    def test_noted_digests_are_used_only_while_the_file_is_the_same(self, copy: Path) -> None:
        before = load(copy).fingerprint
        weights = copy / "model.safetensors"
        remember_digests([weights])
        assert load(copy).fingerprint == before
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        assert load(copy).fingerprint != before

    def test_seeds_and_families_differ_and_repeat(self, tmp_path: Path) -> None:
        prints = [
            load_tokenizer(str(make_tiny_model(tmp_path / name, family, seed=seed)))[2]
            for name, family, seed in (("a", "llama", 0), ("b", "llama", 0), ("c", "llama", 1), ("d", "qwen3", 0))
        ]
        assert prints[0] == prints[1]
        assert len(set(prints)) == 3


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_gguf_equals_the_folder_it_was_written_from(tiny: Tiny, tmp_path: Path, family: str) -> None:
    overrides = {"mistral": {"sliding_window": None}, "gemma3": {"num_hidden_layers": 6}}.get(family, {})
    if family.startswith("gemma"):
        overrides = overrides | {"query_pre_attn_scalar": 16}  # what llama.cpp assumes: the head size
    if family == "gemma3":
        overrides = overrides | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    folder = tiny(family, **overrides)
    file = write_gguf(folder, tmp_path / "model.gguf", arch="llama" if family == "mistral" else "")
    assert (logits(load(file)) - logits(load(folder))).abs().max() <= 1e-5


def test_llama3_frequency_factors_of_a_gguf_are_applied(tiny: Tiny, tmp_path: Path) -> None:
    from test_decoder import LLAMA3

    folder = tiny("llama", rope_parameters=LLAMA3)
    plain, scaled = (load(tiny("llama")).spec.ropes[0], load(folder).spec.ropes[0])
    factors = np.array(plain.inv_freq, dtype=np.float32) / np.array(scaled.inv_freq, dtype=np.float32)
    file = write_gguf(folder, tmp_path / "model.gguf", extra_tensors={"rope_freqs.weight": factors})
    assert (logits(load(file)) - logits(load(folder))).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F16])
def test_quantised_gguf_stays_near(tiny: Tiny, tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    file = write_gguf(tiny("llama"), tmp_path / "model.gguf", quantize=kind)
    rough, exact = logits(load(file)), logits(load(tiny("llama")))
    assert (rough - exact).abs().max() > 0 and torch.nn.functional.cosine_similarity(rough, exact, dim=-1).min() > 0.99


def test_gguf_tokenizer_equals_the_folders(tiny: Tiny, tmp_path: Path) -> None:
    file = write_gguf(tiny("llama"), tmp_path / "model.gguf")
    ours, theirs = load_tokenizer(str(file)), load_tokenizer(str(tiny("llama")))
    messages = [Message("user", "the end <|im_end|> 12  34 日本")]
    assert ours[0].encode_chat(messages) == theirs[0].encode_chat(messages)
    assert ours[0].eos_ids == (2,)
    assert ours[2] == load(file).fingerprint


def test_smollm_pre_tokenizer_splits_digits(tiny: Tiny, tmp_path: Path) -> None:
    file = write_gguf(tiny("llama"), tmp_path / "model.gguf", pre="smollm")
    state = json.loads(load_tokenizer(str(file))[0]._with_special.to_str())["pre_tokenizer"]
    assert [part["type"] for part in state["pretokenizers"]] == ["Digits", "ByteLevel"]
    assert state["pretokenizers"][0]["individual_digits"] is True


class TestRefusedGguf:
    def test_truncated(self, tiny: Tiny, tmp_path: Path) -> None:
        file = write_gguf(tiny("llama"), tmp_path / "cut.gguf")
        data = file.read_bytes()
        for share in (0.02, 0.3, 0.9):
            file.write_bytes(data[: int(len(data) * share)])
            assert "cut.gguf is truncated" in refusal(file, CorruptBlock)

    def test_not_gguf(self, tmp_path: Path) -> None:
        for content in (b"", b"GGUF", b"<html>not found</html>" * 50):
            (tmp_path / "page.gguf").write_bytes(content)
            assert "page.gguf is truncated or not a GGUF file" in refusal(tmp_path / "page.gguf", CorruptBlock)

    def test_missing_tensor(self, tiny: Tiny, tmp_path: Path) -> None:
        file = write_gguf(tiny("llama"), tmp_path / "m.gguf", drop=("blk.1.ffn_up.weight",))
        assert "tensor blk.1.ffn_up.weight is missing from m.gguf" in refusal(file, CorruptBlock)

    def test_architecture(self, tiny: Tiny, tmp_path: Path) -> None:
        file = write_gguf(tiny("llama"), tmp_path / "m.gguf", arch="phi3")
        assert "'phi3' is not supported (supported: llama, qwen2" in refusal(file, Unsupported)

    def test_pre_tokenizer(self, tiny: Tiny, tmp_path: Path) -> None:
        file = write_gguf(tiny("llama"), tmp_path / "m.gguf", pre="deepseek-coder")
        assert "pre-tokenizer 'deepseek-coder' is not supported" in refusal(file, Unsupported)

    def test_rope_scaling(self, tiny: Tiny, tmp_path: Path) -> None:
        file = write_gguf(tiny("llama"), tmp_path / "m.gguf", extra={"llama.rope.scaling.type": "longrope"})
        assert "rope scaling 'longrope'" in refusal(file, Unsupported)


class TestRefusedFolders:
    def test_truncated_weights(self, copy: Path) -> None:
        data = (copy / "model.safetensors").read_bytes()
        for size in (0, 4, 100, len(data) // 2, len(data) - 1):
            (copy / "model.safetensors").write_bytes(data[:size])
            assert "model.safetensors is truncated or broken" in refusal(copy, CorruptBlock)

    def test_a_missing_tensor(self, copy: Path) -> None:
        weights = load_file(copy / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, copy / "model.safetensors")
        assert "tensor model.layers.1.mlp.up_proj.weight is missing" in refusal(copy, CorruptBlock)

    def test_a_tensor_of_another_shape(self, copy: Path) -> None:
        weights = load_file(copy / "model.safetensors")
        weights["model.norm.weight"] = torch.ones(65)
        save_file(weights, copy / "model.safetensors")
        message = refusal(copy, CorruptBlock)
        assert "norm.weight has shape (65,)" in message and "(64,)" in message

    def test_a_tensor_of_integers(self, copy: Path) -> None:
        weights = load_file(copy / "model.safetensors")
        weights["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
        save_file(weights, copy / "model.safetensors")
        assert "model.norm.weight in model.safetensors is torch.int8" in refusal(copy, CorruptBlock)

    def test_a_missing_shard_and_a_broken_index(self, copy: Path) -> None:
        shard(copy)
        (copy / "model-00002-of-00002.safetensors").unlink()
        assert "model-00002-of-00002.safetensors is missing" in refusal(copy, UnknownName)
        (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
        assert "weight file passwd is missing" in refusal(copy, UnknownName)
        (copy / "model.safetensors.index.json").write_text("{")
        assert "index.json is not a safetensors index" in refusal(copy, CorruptBlock)

    def test_no_weights_no_config(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        assert "no .safetensors file" in refusal(copy, UnknownName)
        (copy / "config.json").unlink()
        assert "no config.json" in refusal(copy, UnknownName)

    @pytest.mark.parametrize(
        ("content", "kind", "words"),
        [
            ("{", CorruptBlock, "config.json is not a JSON object"),
            ("[1]", CorruptBlock, "config.json is not a JSON object"),
            ('{"model_type": "gpt2"}', Unsupported, "'gpt2' is not supported (supported: llama, mistral"),
            ('{"model_type": "nosuch"}', Unsupported, "'nosuch' is not supported"),
            ("{}", Unsupported, "None is not supported"),
            ('{"model_type": "llama", "hidden_size": "wide"}', CorruptBlock, "config.json is not a llama config"),
        ],
    )
    def test_configs(self, copy: Path, content: str, kind: type[WinnowError], words: str) -> None:
        (copy / "config.json").write_text(content)
        assert words in refusal(copy, kind)


class TestSources:
    def test_unknown_ones_list_what_there_is(self, tmp_path: Path) -> None:
        assert "no folder or file 'nowhere'" in refusal(tmp_path / "nowhere", UnknownName)
        assert "no folder or file 'm.gguf'" in refusal(tmp_path / "m.gguf", UnknownName)
        (tmp_path / "m.bin").write_bytes(b"x")
        assert "m.bin is neither a folder nor a .gguf file" in refusal(tmp_path / "m.bin", Unsupported)

    def test_a_hub_id_without_network_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(Unsupported, match=r"no-such-org/no-such-model: the hub cannot be reached .* model 'default'"):
            load_model("no-such-org/no-such-model")

    def test_names(self, tmp_path: Path) -> None:
        assert model_name("default") == "smollm2-135m-instruct"
        assert model_name("org/some-model") == "org/some-model"
        assert model_name(str(tmp_path / "folder")) == "folder"
        assert model_name(str(tmp_path / "file.Q4.gguf")) == "file.Q4"

    @pytest.mark.parametrize("options", [{"dtype": "int8"}, {"device": "tpu"}, {"device": "cuda:99"}, {"device": "meta"}])
    def test_wrong_options_are_named(self, tiny: Tiny, options: dict[str, str]) -> None:
        assert next(iter(options)) in refusal(tiny("llama"), InvalidRequest, **options)

    def test_layers_out_of_range(self, tiny: Tiny) -> None:
        assert "n_layers must be in [1, 2], got 3" in refusal(tiny("llama"), InvalidRequest, n_layers=3)

    def test_auto_dtype_is_one_this_machine_multiplies_itself(self, tiny: Tiny) -> None:
        assert auto_dtype(torch.device("cuda")) == "bf16"
        assert load(tiny("llama"), dtype="auto").dtype_name == auto_dtype(torch.device("cpu"))
