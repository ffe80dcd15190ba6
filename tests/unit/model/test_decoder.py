"""The decoder against transformers, and against itself in chunks and token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from winnow.errors import ContextTooLong, InvalidRequest, Unsupported
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.model import decoder as decoder_module
from winnow.workers.model.decoder import Decoder, Step, rms_norm
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.packed import FEW_ROWS, cpu_multiplies_bf16
from winnow.workers.model.reference import DenseBackend
from winnow.workers.model.rope import rotate
from winnow.workers.model.spec import FAMILIES, ModelSpec

Tiny = Callable[..., Path]
TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def prompt(n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 290, (n_tokens,), generator=torch.Generator().manual_seed(seed))


def expected_logits(folder: Path, tokens: Tensor) -> Tensor:
    # eager, because transformers' SDPA path leaves Gemma 2's soft cap out
    model = AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(tokens[None]).logits[0]
    return logits


def run(model: LoadedModel, tokens: Tensor, chunk: int, backend: DenseBackend | None = None) -> Tensor:
    backend = backend or DenseBackend(model.spec, len(tokens), model.decoder.dtype)
    parts = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        positions = torch.arange(start, start + len(part))
        parts.append(model.decoder.forward(part, positions, backend))
    return model.decoder.logits(torch.cat(parts))


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(str(folder), dtype="fp32", device="cpu", **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_tokens", [1, 47, 48, 49, 200])  # the sliding window is 48
def test_logits_equal_transformers_for_every_family(tiny: Tiny, family: str, n_tokens: int) -> None:
    folder, tokens = tiny(family), prompt(n_tokens)
    actual = run(load(folder), tokens, n_tokens)
    assert actual.dtype == torch.float32
    assert (actual - expected_logits(folder, tokens)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}},
        ),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
        ),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("llama", {"head_dim": 32}),
        ("qwen3", {"attention_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
        ("mistral", {"sliding_window": None}),
        ("gemma3", {"num_hidden_layers": 6}),
        ("gemma2", {"hidden_activation": "gelu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_logits_equal_transformers_for_config_variants(tiny: Tiny, family: str, overrides: dict[str, Any]) -> None:
    folder, tokens = tiny(family, **overrides), prompt(130)
    assert (run(load(folder), tokens, 130) - expected_logits(folder, tokens)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_and_cached_decode_equal_the_whole_prompt(tiny: Tiny, family: str, chunk: int) -> None:
    model, tokens = load(tiny(family)), prompt(130)
    assert (run(model, tokens, chunk) - run(model, tokens, 130)).abs().max() <= TOLERANCE


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been(tiny: Tiny) -> None:
    model = load(tiny("gemma3"))
    backend = DenseBackend(model.spec, 200, torch.float32)
    run(model, prompt(100, seed=1), 100, backend)
    backend.truncate(60)
    tail = prompt(20, seed=2)
    again = model.decoder.logits(model.decoder.forward(tail, torch.arange(60, 80), backend))
    whole = run(model, torch.cat((prompt(100, seed=1)[:60], tail)), 80)[60:]
    assert (again - whole).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bf16_logits_stay_near_fp32(tiny: Tiny, family: str) -> None:
    tokens = prompt(100)
    half = load_model(str(tiny(family)), dtype="bf16", device="cpu")
    assert half.dtype_name == "bf16" and half.decoder.embed.dtype == torch.bfloat16
    exact, rough = run(load(tiny(family)), tokens, 100), run(half, tokens, 100)
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=-1).min() > 0.99


def test_mlp_slices_do_not_change_the_result(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = load(tiny("gemma2")), prompt(100)
    whole = run(model, tokens, 100)
    monkeypatch.setattr(decoder_module, "MLP_SLICE_TOKENS", 33)
    assert (run(model, tokens, 100) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])  # with biases; with norms after the blocks and a tied head
def test_prepared_for_decoding_the_logits_stay_the_same(tiny: Tiny, family: str) -> None:
    model, tokens = load(tiny(family)), prompt(FEW_ROWS + 9)
    expected = run(model, tokens, len(tokens))
    model.decoder.prepare_decoding()
    for chunk in (1, 8, FEW_ROWS, FEW_ROWS + 1):  # packed weights up to FEW_ROWS rows, the plain ones above
        torch.testing.assert_close(run(model, tokens, chunk), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(not cpu_multiplies_bf16(), reason="bf16 is emulated on this processor and stays in its plain layout")
def test_prepared_for_decoding_bf16_logits_stay_as_near_to_fp32(tiny: Tiny) -> None:
    tokens = prompt(FEW_ROWS + 9)
    exact = run(load(tiny("qwen2")), tokens, len(tokens))
    half = load_model(str(tiny("qwen2")), dtype="bf16", device="cpu")
    plain = (run(half, tokens, 8) - exact).abs().max()
    half.decoder.prepare_decoding()
    assert half.decoder._packed is not None
    assert (run(half, tokens, 8) - exact).abs().max() <= 2 * plain


def test_iter_forward_yields_each_layer_and_returns_what_forward_returns(tiny: Tiny) -> None:
    model, tokens = load(tiny("llama", num_hidden_layers=4)), prompt(20)
    steps = model.decoder.iter_forward(tokens, torch.arange(20), DenseBackend(model.spec, 20, torch.float32))
    seen = []
    while True:
        try:
            seen.append(next(steps))
            assert not torch.is_inference_mode_enabled()  # the caller's mode is its own between layers
        except StopIteration as end:
            hidden = end.value
            break
    expected = model.decoder.forward(tokens, torch.arange(20), DenseBackend(model.spec, 20, torch.float32))
    assert seen == [0, 1, 2, 3]
    assert torch.equal(hidden, expected)


def test_a_closed_iter_forward_runs_no_further_layer(tiny: Tiny) -> None:
    model = load(tiny("llama", num_hidden_layers=4))
    backend = DenseBackend(model.spec, 20, torch.float32)
    steps = model.decoder.iter_forward(prompt(20), torch.arange(20), backend)
    next(steps)
    steps.close()
    assert backend.n_cached == [20, 0, 0, 0]


def test_fewer_layers_give_the_hidden_states_before_the_final_norm(tiny: Tiny) -> None:
    folder = tiny("llama", num_hidden_layers=4)
    model, cut, tokens = load(folder), load(folder, n_layers=2), prompt(30)
    raw = model.decoder.forward(tokens, torch.arange(30), DenseBackend(model.spec, 30, torch.float32), n_layers=2)
    normed = rms_norm(raw, model.decoder.norm, model.spec.norm_eps)
    draft = cut.decoder.forward(tokens, torch.arange(30), DenseBackend(cut.spec, 30, torch.float32))
    assert cut.spec.n_layers == 2
    assert (normed - draft).abs().max() <= 1e-5


@pytest.mark.parametrize("n_layers", [-1, 3])
def test_layers_out_of_range_are_refused(tiny: Tiny, n_layers: int) -> None:
    model = load(tiny("llama"))
    with pytest.raises(InvalidRequest, match=r"n_layers must be in \[0, 2\]"):
        model.decoder.forward(prompt(2), torch.arange(2), DenseBackend(model.spec, 2, torch.float32), n_layers=n_layers)


@pytest.mark.parametrize("position", [-1, 2048])
def test_positions_outside_the_context_are_refused(tiny: Tiny, position: int) -> None:
    model = load(tiny("llama"))
    with pytest.raises(ContextTooLong, match="2048 tokens"):
        model.decoder.forward(prompt(1), torch.tensor([position]), DenseBackend(model.spec, 2, torch.float32))


def test_a_full_reference_cache_says_so(tiny: Tiny) -> None:
    model = load(tiny("llama"))
    with pytest.raises(ContextTooLong, match="capacity of 9"):
        run(model, prompt(10), 10, DenseBackend(model.spec, 9, torch.float32))


class Recorder:
    """Passes everything on and keeps what it was handed."""

    def __init__(self, inner: DenseBackend) -> None:
        self.inner = inner
        self.calls: list[tuple[LayerSpec, Tensor, Tensor, Tensor, RawQK]] = []

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        self.calls.append((layer, q, k, v, raw))
        return self.inner.attend(layer, q, k, v, raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_get_q_and_k_from_before_and_after_rope(tiny: Tiny, family: str) -> None:
    model, positions = load(tiny(family)), torch.arange(5, 25)
    recorder = Recorder(DenseBackend(model.spec, 20, torch.float32))
    model.decoder.forward(prompt(20), positions, recorder)
    assert [call[0] for call in recorder.calls] == list(model.spec.layers)
    for layer, q, k, v, raw in recorder.calls:
        assert (q.shape, k.shape, v.shape) == ((4, 20, 16), (2, 20, 16), (2, 20, 16))
        cos, sin = model.decoder._ropes[model.spec.layer_ropes[layer.idx]].rows(positions)
        for before, after in ((raw.q, q), (raw.k, k)):
            assert not torch.equal(before, after)
            assert torch.equal(rotate(before.transpose(0, 1), cos, sin).transpose(0, 1), after)


def test_rotation_keeps_lengths_and_depends_on_distance_only(tiny: Tiny) -> None:
    table = load(tiny("llama")).decoder._ropes[0]
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).unbind()
    near = rotate(q, *table.rows(torch.tensor([9]))).flatten() @ rotate(k, *table.rows(torch.tensor([4]))).flatten()
    far = rotate(q, *table.rows(torch.tensor([1009]))).flatten() @ rotate(k, *table.rows(torch.tensor([1004]))).flatten()
    assert torch.allclose(near, far, atol=1e-4)
    assert torch.allclose(rotate(q, *table.rows(torch.tensor([700]))).norm(), q.norm(), atol=1e-5)


def test_a_layer_can_have_another_token_mixer(tiny: Tiny) -> None:
    model, tokens = load(tiny("llama")), prompt(20)
    before = run(model, tokens, 20)
    decoder: Decoder = model.decoder
    seen: list[tuple[int, tuple[int, ...]]] = []

    def mean_of_the_past(idx: int, x: Tensor, step: Step) -> Tensor:
        seen.append((idx, tuple(x.shape)))
        return x.cumsum(0) / (step.positions + 1)[:, None]

    decoder.mixers[1] = mean_of_the_past
    backend = DenseBackend(model.spec, 20, torch.float32)
    after = run(model, tokens, 20, backend)
    assert seen == [(1, (20, 64))]
    assert backend.n_cached == [20, 0]
    assert (after - before).abs().max() > 0.01
    decoder.mixers[1] = decoder.softmax_attention
    assert torch.equal(run(model, tokens, 20), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torch(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    weight = torch.linspace(-2, 2, 64).to(dtype)
    expected = torch.nn.functional.rms_norm(x.double(), (64,), weight.double(), 1e-6)
    limit = 1e-5 if dtype == torch.float32 else 2**-7
    actual = rms_norm(x, weight, 1e-6)
    assert actual.dtype == dtype
    assert ((actual.double() - expected).abs() <= limit * expected.abs().clamp(min=1)).all()


class TestSpec:
    def test_windows_follow_layer_types(self, tiny: Tiny) -> None:
        assert [layer.window for layer in load(tiny("gemma3")).spec.layers] == [48, 0]
        assert [layer.window for layer in load(tiny("gemma2")).spec.layers] == [48, 0]
        assert [layer.window for layer in load(tiny("mistral")).spec.layers] == [48, 48]
        assert not load(tiny("llama")).spec.windowed
        assert load(tiny("gemma2")).spec.softcapped and not load(tiny("gemma3")).spec.softcapped

    def test_gemma3_has_a_rope_of_its_own_for_local_layers(self, tiny: Tiny) -> None:
        spec = load(tiny("gemma3")).spec
        assert len(spec.ropes) == 2
        local, far = (spec.ropes[i].inv_freq[1] for i in spec.layer_ropes)
        assert local == pytest.approx(10_000 ** (-2 / 16)) and far == pytest.approx(1e6 ** (-2 / 16))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "gpt2"}, "'gpt2' is not supported"),
            ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
            ({"hidden_act": "relu"}, "activation 'relu'"),
            ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
        ],
    )
    def test_what_it_does_not_know_is_refused_by_name(self, changes: dict[str, Any], message: str) -> None:
        from transformers import LlamaConfig

        config = LlamaConfig(num_hidden_layers=1)
        for key, value in changes.items():
            object.__setattr__(config, key, value) if key == "model_type" else setattr(config, key, value)
        with pytest.raises(Unsupported, match=message):
            ModelSpec.from_config(config)
