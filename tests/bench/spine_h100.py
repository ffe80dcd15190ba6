"""One GPU, one process: an 8B-shaped Llama with random weights through winnow's own engines.

    python tests/bench/spine_h100.py

`dense_prefill_*`: wall time of the prefill engine beside the floor of its parts in the same run: the linear layers alone
(this model's own weights, same slices) plus cuDNN's causal attention alone, times the layers. `decode_8k`: milliseconds a
token beside the time that reading the weights and the KV once takes at the measured copy bandwidth. Random weights: speed
only; logits are checked finite, correctness is the test suite's.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))
from paths import ensure_importable

ensure_importable()
from results import Row, row, write
from transformers import LlamaConfig

from winnow.config import DecodeConfig, KVConfig, PrefillConfig
from winnow.index.layout import SegmentLayout
from winnow.index.store import SegmentStore
from winnow.types import Sampling
from winnow.workers.decode.job import DecodeJob, Tokens
from winnow.workers.decode.worker import DecodeEngine
from winnow.workers.model.build import build_decoder
from winnow.workers.model.loader import LoadedModel, load_tokenizer
from winnow.workers.model.names import weight_shapes
from winnow.workers.model.spec import ModelSpec
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill.job import PrefillJob, PrefillResult
from winnow.workers.prefill.worker import PrefillEngine

SLICE = 16_384  # tokens of one linear-layer call, as the decoder's MLP


class RandomSource:
    """Seeded normal weights on the GPU, made as they are asked for."""

    norms_hold_one = False

    def __init__(self, spec: ModelSpec) -> None:
        self.shapes = weight_shapes(spec)

    def get(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device="cuda")
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02


def build() -> LoadedModel:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131_072 + 8_192, rope_theta=500_000.0,
    )  # fmt: skip
    spec = ModelSpec.from_config(config)
    torch.manual_seed(0)
    decoder = build_decoder(spec, RandomSource(spec), torch.bfloat16, torch.device("cuda"))
    tokenizer, _, _ = load_tokenizer(str(make_tiny_model(Path(tempfile.mkdtemp()))))  # the engines never call it
    return LoadedModel("llama-8b-shaped", spec, decoder, tokenizer, "random-weights", "bf16")


def wait(submit: Callable[..., Any], job: Any) -> list[Any]:
    events: list[Any] = []
    handle = submit(job, events.append)
    handle.finished.wait()
    torch.cuda.synchronize()
    if hasattr(events[-1], "error"):
        raise events[-1].error
    return events


def timed(run: Callable[[], Any], n: int) -> list[float]:
    """Seconds of each of n calls, after one that is not counted."""
    run()
    seconds = []
    for _ in range(n):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def floor_s(model: LoadedModel, n_tokens: int, n: int) -> list[float]:
    """The parts alone: every layer's four matrix products over n_tokens, and cuDNN's causal attention, summed."""
    decoder, spec = model.decoder, model.spec
    x = torch.randn(min(SLICE, n_tokens), spec.hidden_size, dtype=torch.bfloat16, device="cuda")
    wide = torch.randn(min(SLICE, n_tokens), spec.mlp_size, dtype=torch.bfloat16, device="cuda")

    def linear() -> None:
        for _ in range(-(-n_tokens // SLICE)):
            for layer in decoder.layers:
                F.linear(x, layer.qkv)
                F.linear(x, layer.out)
                F.linear(x, layer.gate_up)
                F.linear(wide, layer.down)

    heads = spec.n_q_heads
    q = torch.randn(1, heads, n_tokens, spec.head_size, dtype=torch.bfloat16, device="cuda")
    k = torch.randn(1, spec.n_kv_heads, n_tokens, spec.head_size, dtype=torch.bfloat16, device="cuda")
    v = torch.randn_like(k)

    def attention() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    linear_s, attention_s = timed(linear, n), timed(attention, n)
    layer_ms = statistics.median(attention_s) * 1e3
    print(f"  floor {n_tokens}: linear {statistics.median(linear_s):.3f} s, attention {layer_ms:.2f} ms a layer")
    return [a + b * spec.n_layers for a, b in zip(linear_s, attention_s, strict=True)]


def prefill_rows(model: LoadedModel, store: SegmentStore) -> list[Row]:
    rows = []
    generator = torch.Generator().manual_seed(1)
    with PrefillEngine(model, store, PrefillConfig(chunk_tokens=0)) as engine:
        for label, n_tokens, n in (("32k", 32_768, 3), ("128k", 131_072, 2)):
            ids = torch.randint(0, model.spec.vocab_size, (n_tokens + 1,), generator=generator).tolist()
            torch.cuda.reset_peak_memory_stats()

            def run(ids: list[int] = ids) -> None:
                result = wait(engine.submit, PrefillJob("bench", ids, no_cache=True))[-1]
                assert isinstance(result, PrefillResult)
                store.release(result.segment)

            seconds = timed(run, n)
            peak = torch.cuda.max_memory_allocated() / 1e9
            floor = floor_s(model, n_tokens, n)
            rows.append(row(f"dense_prefill_{label}", seconds, "s", "linear + cuDNN attention alone", floor))
            rows.append(
                row(
                    f"dense_prefill_{label}_memory",
                    [peak],
                    "GB",
                    "an 80 GB device",
                    [80.0],
                    "peak allocated, weights and KV included",
                )
            )
    return rows


def decode_rows(model: LoadedModel, store: SegmentStore, context: int = 8_192, new: int = 64) -> list[Row]:
    ids = torch.randint(0, model.spec.vocab_size, (context,), generator=torch.Generator().manual_seed(2)).tolist()
    per_token: list[float] = []
    with PrefillEngine(model, store, PrefillConfig(chunk_tokens=0)) as prefill, DecodeEngine(model, DecodeConfig()) as decode:
        for _ in range(4):
            result = wait(prefill.submit, PrefillJob("bench", ids, tail_tokens=new + 1, no_cache=True))[-1]
            times: list[float] = []
            done = threading.Event()

            def on_event(event: object, times: list[float] = times, done: threading.Event = done) -> None:
                times.append(time.perf_counter())
                if not isinstance(event, Tokens) or event.finish_reason:
                    done.set()

            decode.submit(
                DecodeJob("bench", result.lease.segment, ids[-1], Sampling(max_tokens=new, ignore_eos=True)), on_event
            ).finished.wait()
            done.wait()
            assert len(times) == new
            gaps = [b - a for a, b in itertools.pairwise(times[8:])]
            per_token.append(statistics.median(gaps) * 1e3)
            store.release(result.segment)
    spec = model.spec
    weights = sum(t.numel() * 2 for layer in model.decoder.layers for t in (layer.qkv, layer.out, layer.gate_up, layer.down))
    weights += model.decoder.head.numel() * 2
    kv = spec.n_layers * 2 * spec.n_kv_heads * spec.head_size * 2 * context
    block = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(block)
    copy = statistics.median(timed(lambda: target.copy_(block), 5))
    bandwidth = 2 * block.numel() / copy
    print(f"  copy bandwidth {bandwidth / 1e12:.2f} TB/s, weights {weights / 1e9:.2f} GB, KV {kv / 1e9:.2f} GB")
    floor_ms = (weights + kv) / bandwidth * 1e3
    return [row("decode_8k", per_token[1:], "ms/token", "weights and KV read once at copy bandwidth", [floor_ms],
                "demanded: 12 ms a token")]  # fmt: skip


def main() -> None:
    model = build()
    spec = model.spec
    layout = SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, "bf16")
    store = SegmentStore(layout, model.fingerprint, KVConfig(budget_bytes=40 << 30), "bench", 1, "here", device="cuda")
    rows = decode_rows(model, store) + prefill_rows(model, store)
    store.check()
    store.close()
    write("spine_h100.json", rows)


if __name__ == "__main__":
    main()
