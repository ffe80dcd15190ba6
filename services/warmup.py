"""The canary: before a process says SERVING, its production path must give the answer of an independent plain one (R14).

Prefill is asked for the KV of a fixed token sequence, decode to continue one, retrieval to search one, each the way a
request would; `winnow.workers.model.reference.DenseBackend` computes the same with nothing but torch. Tokens are judged by
the reference's own scores, so that a tie that rounding may break either way is no fault. The weights' digest is taken when
they are loaded and again here: damaged weights would give the same wrong answer on both paths.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from winnow.errors import WinnowError
from winnow.index.segment import KVSegment, SegmentLayout
from winnow.index.store import SegmentStore
from winnow.services.scoring.servicer import keep
from winnow.types import Sampling
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.decode.job import DecodeJob, Tokens
from winnow.workers.decode.job import Failed as DecodeFailed
from winnow.workers.decode.local_retrieval import SegmentIndex
from winnow.workers.decode.methods.dense import Dense as DenseDecode
from winnow.workers.decode.worker import DecodeEngine
from winnow.workers.draft.base import draft_scorers
from winnow.workers.model.decoder import Decoder
from winnow.workers.model.loader import LoadedModel
from winnow.workers.model.reference import DenseBackend
from winnow.workers.prefill.job import Failed as PrefillFailed
from winnow.workers.prefill.job import PrefillJob, PrefillResult
from winnow.workers.prefill.methods.dense import Dense as DensePrefill
from winnow.workers.prefill.worker import PrefillEngine

PROMPT_TOKENS = 24
NEW_TOKENS = 4
TIMEOUT_S = 120.0
SAMPLED_VALUES = 1 << 20  # of each weight tensor: enough to see damage, quick on models of any size
# Relative error of K and V of a whole layer, and how far below the best score a chosen token may lie (relative to the
# spread of the scores): several times what rounding gives, far below what a wrong mask, position or weight gives.
_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 6e-2}


class WrongAnswer(WinnowError):
    """The canary's answer is wrong: this process must not serve."""


@dataclass(frozen=True)
class Expected:
    """The reference's view of the canary prompt: K and V [L, Hkv, n-1, D] of all but its last token."""

    token_ids: list[int]
    k: Tensor
    v: Tensor


def canary_tokens(vocab_size: int, n: int = PROMPT_TOKENS) -> list[int]:
    """A fixed sequence without structure; the same for every start of a model."""
    return [(i * 7919 + 104729) % vocab_size for i in range(1, n + 1)]


def expect(model: LoadedModel) -> Expected:
    """Run the reference over the canary prompt."""
    ids = canary_tokens(model.spec.vocab_size)
    backend = DenseBackend(model.spec, len(ids) - 1, model.decoder.dtype, model.decoder.device)
    _forward(model.decoder, ids[:-1], 0, backend)
    return Expected(ids, torch.stack(backend.k), torch.stack(backend.v))


def check_weights(model: LoadedModel, digest_at_load: str) -> None:
    """Raises WrongAnswer when the weights are not those that were loaded."""
    if weights_digest(model.decoder) != digest_at_load:
        raise WrongAnswer("warm-up: the weights changed after they were loaded; memory may be damaged; restart the worker")


def check_prefill(engine: PrefillEngine, store: SegmentStore, expected: Expected) -> None:
    """Prefill the canary prompt through the engine and compare its KV with the reference's.

    Raises:
        WrongAnswer: it differs, or the engine failed.
    """
    job = PrefillJob("warm-up", expected.token_ids, method=DensePrefill(), no_cache=True)
    last = _run(lambda put: engine.submit(job, put), (PrefillResult, PrefillFailed))
    if isinstance(last, PrefillFailed):
        raise WrongAnswer(f"warm-up: prefill failed ({type(last.error).__name__})")
    assert isinstance(last, PrefillResult)
    try:
        segment, n = last.lease.segment, len(expected.token_ids) - 1
        tolerance = _TOLERANCE[engine.model.dtype_name]
        for name, got, wanted in (("K", segment.kv[:, 0, :, :n], expected.k), ("V", segment.kv[:, 1, :, :n], expected.v)):
            for layer, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
                error = relative_error(ours.to(theirs.device), theirs)
                if not error <= tolerance:
                    raise WrongAnswer(f"warm-up: prefill's {name} of layer {layer} is off by {error:.3g}, allowed {tolerance:g}")
    finally:
        store.release(last.segment)


def check_decode(engine: DecodeEngine, model: LoadedModel, expected: Expected) -> None:
    """Continue the canary prompt through the engine, from the reference's KV, and judge each token by the reference.

    Args:
        model: computes the reference.

    Raises:
        WrongAnswer: a token is not among the best, or the engine failed.
    """
    spec, n = model.spec, len(expected.token_ids) - 1
    layout = SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, model.dtype_name)
    segment = KVSegment.create(layout, n + NEW_TOKENS + 1, device=model.decoder.device)
    for layer in range(spec.n_layers):
        segment.write(layer, 0, expected.k[layer], expected.v[layer])
    segment.advance(expected.token_ids[:-1])
    segment.seal()
    job = DecodeJob("warm-up", segment, expected.token_ids[-1], Sampling(max_tokens=NEW_TOKENS, ignore_eos=True), DenseDecode())
    got: list[int] = []
    last = _run(lambda put: engine.submit(job, put), (DecodeFailed,), lambda e: _collect(e, got))
    if isinstance(last, DecodeFailed):
        raise WrongAnswer(f"warm-up: decode failed ({type(last.error).__name__})")
    _judge(model, expected, got)


def check_retrieval(spec_layer: LayerSpec) -> None:
    """Search a small random segment for all of its keys and compare with plain softmax attention. Raises WrongAnswer."""
    generator = torch.Generator().manual_seed(7)
    layer = LayerSpec(0, spec_layer.n_q_heads, spec_layer.n_kv_heads, spec_layer.head_size, spec_layer.scale, spec_layer.softcap)
    n, d = 32, layer.head_size
    k, v = torch.randn(2, layer.n_kv_heads, n, d, generator=generator)
    q = torch.randn(layer.n_q_heads, d, generator=generator)
    segment = KVSegment.create(SegmentLayout(1, layer.n_kv_heads, d, "fp32"), n)
    segment.write(0, 0, k, v)
    segment.advance(list(range(n)))
    segment.seal()
    found = SegmentIndex(segment, "flat", 0, 0).attend(layer, q, n)
    group = layer.n_q_heads // layer.n_kv_heads
    scores = torch.einsum("hd,hnd->hn", q, k.repeat_interleave(group, 0)) * layer.scale
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    wanted = torch.einsum("hn,hnd->hd", scores.softmax(-1), v.repeat_interleave(group, 0))
    error = relative_error(found.out, wanted)
    if not error <= _TOLERANCE["fp32"]:
        raise WrongAnswer(f"warm-up: a search's attention is off by {error:.3g}")


def check_draft(draft: LoadedModel) -> None:
    """Run the default reducer over a prompt that it must shorten; its answer must have the promised form. Raises WrongAnswer."""
    ids = torch.tensor(canary_tokens(draft.spec.vocab_size, 4 * PROMPT_TOKENS))
    for name in draft_scorers.names()[:1]:
        params = {"capacity": PROMPT_TOKENS, "window": 4, "sink": 4, "pool": 3} if name == "specpc" else {}
        kept = keep(draft_scorers.create(name, params), draft, ids, lambda done, total: None, lambda: False)
        if kept != sorted(set(kept)) or not kept or kept[-1] != len(ids) - 1 or kept[0] < 0:
            raise WrongAnswer(f"warm-up: reducer {name} did not give an ascending choice of prompt tokens")


def weights_digest(decoder: Decoder) -> str:
    """Digest of (a sample of) every weight tensor. Cost: at most `SAMPLED_VALUES` values of each."""
    digest = xxhash.xxh3_128()
    for tensor in _tensors([decoder.embed, decoder.layers, decoder.norm, decoder.head]):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED_VALUES)
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted`, float32; NaN where `got` is not finite."""
    a, b = got.float(), wanted.float()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def _judge(model: LoadedModel, expected: Expected, got: list[int]) -> None:
    if len(got) != NEW_TOKENS:
        raise WrongAnswer(f"warm-up: decode gave {len(got)} tokens instead of {NEW_TOKENS}")
    backend = DenseBackend(model.spec, len(expected.token_ids) + NEW_TOKENS, model.decoder.dtype, model.decoder.device)
    fed = expected.token_ids + got[:-1]
    hidden = _forward(model.decoder, fed, 0, backend)
    scores = model.decoder.logits(hidden[-NEW_TOKENS:])  # [NEW_TOKENS, vocab]
    best = scores.max(-1).values
    spread = (best - scores.mean(-1)).clamp_min(1e-6)
    behind = ((best - scores[torch.arange(NEW_TOKENS), torch.tensor(got)]) / spread).tolist()
    for step, gap in enumerate(behind):
        if not gap <= _TOLERANCE[model.dtype_name]:
            raise WrongAnswer(f"warm-up: token {step} of decode is not the reference's (its score is {gap:.3g} behind)")


@torch.inference_mode()
def _forward(decoder: Decoder, ids: list[int], start: int, backend: DenseBackend) -> Tensor:
    positions = torch.arange(start, start + len(ids))
    return decoder.forward(torch.tensor(ids), positions, backend)


def _collect(event: object, got: list[int]) -> bool:
    if isinstance(event, Tokens):
        got.extend(event.token_ids)
        return bool(event.finish_reason)
    return False


def _run(
    submit: Callable[[Callable[[Any], None]], Any], last_kinds: tuple[type, ...], is_last: Callable[[Any], bool] = lambda e: False
) -> Any:
    """Submit a job and wait for its last event in this thread. Raises WrongAnswer when none comes."""
    done = threading.Event()
    box: list[Any] = []

    def take(event: Any) -> None:
        if is_last(event) or isinstance(event, last_kinds):
            box.append(event)
            done.set()

    job = submit(take)
    if not done.wait(TIMEOUT_S):
        job.cancel()
        raise WrongAnswer(f"warm-up: no answer within {TIMEOUT_S:g} s")
    return box[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
