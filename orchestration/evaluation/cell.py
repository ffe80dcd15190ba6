"""One prompt through the real model with one prefill method: timed, answered, scored, and measured layer by layer.

Three steps, so that none disturbs another: a prefill that nothing else happens in (the time to the first token), greedy
decoding with dense attention over the KV it left, and, where asked for, a second prefill with `MeasuredBackend`. The whole
prompt goes through the method, its last token too; a served request leaves that one to the decode method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from winnow.index.segment import KVSegment, SegmentLayout
from winnow.orchestration.evaluation.maps import AttentionMap
from winnow.orchestration.evaluation.measured import LayerLog, MeasuredBackend, Recorder
from winnow.orchestration.evaluation.metrics import head_summary, kl_divergence
from winnow.orchestration.evaluation.prompt import Prompt
from winnow.orchestration.evaluation.task import Task
from winnow.workers.decode.backend import DecodeBackend, Slot
from winnow.workers.decode.methods.dense import Dense
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill.backend import PrefillBackend, Tally
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.methods.dense import Dense as DensePrefill
from winnow.workers.prefill.prompt import Pass, plan_passes

MakeBackend = Callable[[Pass], PrefillBackend]


@dataclass(frozen=True, eq=False)
class Measured:
    """What the second prefill found.

    Attributes:
        by_head: name -> [L][Hq]: density, recall_mean, recall_p5, recall_min, oracle_ratio (mean of R / R_oracle over rows),
            eps (Frobenius error of the output over its norm, on the sampled rows).
        overall: the same over all layers, heads and rows at once.
        select_s, attend_s: [L] seconds.
    """

    by_head: dict[str, list[list[float]]]
    overall: dict[str, float]
    select_s: list[float]
    attend_s: list[float]
    map: AttentionMap | None = None


@dataclass(frozen=True, eq=False)
class CellResult:
    """One method on one prompt.

    Attributes:
        score: of the task, 0 to 1.
        text: what the model said; "" for likelihood tasks.
        prefill_s: seconds from the prompt to the scores of the next token, device included.
        density: kept over causal pairs over layers, heads and rows.
        kl: KL(dense || method) of the next-token distribution at the end of the prompt, nats.
        logits: [V] float32 on the CPU, those scores.
    """

    score: float
    text: str
    prefill_s: float
    density: float
    kl: float
    logits: Tensor = field(repr=False)
    measured: Measured | None = None


@torch.inference_mode()
def run_cell(
    model: LoadedModel,
    task: Task,
    prompt: Prompt,
    method: PrefillMethod,
    *,
    dense_logits: Tensor | None = None,
    chunk_tokens: int = 0,
    tail_tokens: int = 0,
    n_rows: int = 0,
    map_at: tuple[int, int] | None = None,
) -> CellResult:
    """Run one prompt.

    Args:
        method: bound to the model already.
        dense_logits: those of the dense run of the same prompt; None = this is that run.
        chunk_tokens: of the whole prefill, as `prefill.sparse_chunk_tokens`; 0 = the prompt in one pass.
        tail_tokens: as `prefill.dense_tail_tokens`.
        n_rows: query rows to measure attention on; 0 = leave the second prefill out.
        map_at: (layer, query head) whose attention map to keep.

    Raises:
        Unsupported: the method cannot work with this model or prompt.
        ArithmeticError: the model's scores are not finite: the method is broken.
    """
    decoder = model.decoder
    ids, n = prompt.token_ids, len(prompt.token_ids)
    segment = _segment(model, n + prompt.max_new_tokens)
    tally = Tally()
    unscored = max(0, min(tail_tokens, n - prompt.scored_tokens - 1))  # the end that is dense whatever the method
    kept = prompt.scored_tokens + 1 + unscored  # the row that predicts the first scored token, and those after it
    _settle(decoder.device)
    began = time.perf_counter()
    method = method.for_prompt(segment.key_tiles)  # as serving does: chunks pool their own keys only
    passes = plan_passes(method, n, 0, 0, chunk_tokens, tail_tokens)  # those that serving uses
    hidden = _prefill(
        model, segment, ids, passes, kept, lambda one: PrefillBackend(segment, one.start, one.method, tally, one.planned)
    )
    logits = decoder.logits(hidden[-1:])[0].cpu()  # the copy waits for the device
    prefill_s = time.perf_counter() - began
    if not bool(logits.isfinite().all()):
        raise ArithmeticError(f"{method.name}: the scores after a prompt of {n} tokens are not finite")
    if task.generates:
        text = _answer(model, segment, int(logits.argmax()), prompt)
        score = task.score(text, prompt)
    else:
        first = n - unscored - prompt.scored_tokens
        text, score = "", _likelihood(model, hidden[: prompt.scored_tokens], ids[first : n - unscored])
    measured = None
    if n_rows:
        segment.truncate(0)
        recorder = Recorder(n, n_rows, map_at)
        again = Tally()
        _prefill(
            model, segment, ids, passes, 1,
            lambda one: MeasuredBackend(segment, one.start, one.method, again, one.planned, recorder=recorder),
        )  # fmt: skip
        measured = _summary(recorder, model.spec.n_layers)
    kl = 0.0 if dense_logits is None else kl_divergence(dense_logits, logits)
    return CellResult(score, text, prefill_s, tally.density, kl, logits, measured)


@torch.inference_mode()
def next_logits(
    model: LoadedModel, prompt: Prompt, chunk_tokens: int = 0, tail_tokens: int = 0, method: PrefillMethod | None = None
) -> Tensor:
    """Scores [V] of the token after a prompt, on the CPU; with dense prefill unless a method is given."""
    n = len(prompt.token_ids)
    segment = _segment(model, n)
    method = (method or DensePrefill()).for_prompt(segment.key_tiles)
    passes = plan_passes(method, n, 0, 0, chunk_tokens, tail_tokens)
    hidden = _prefill(
        model, segment, prompt.token_ids, passes, 1,
        lambda one: PrefillBackend(segment, one.start, one.method, Tally(), one.planned),
    )  # fmt: skip
    return model.decoder.logits(hidden)[0].cpu()


def _segment(model: LoadedModel, capacity: int) -> KVSegment:
    spec = model.spec
    layout = SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, model.dtype_name)
    return KVSegment.create(layout, capacity, device=model.decoder.device)


def _prefill(
    model: LoadedModel, segment: KVSegment, ids: Sequence[int], passes: Sequence[Pass], n_last: int, make: MakeBackend
) -> Tensor:
    """The prompt's KV into the segment. Returns hidden states [n_last, hidden]."""
    decoder = model.decoder
    tokens = torch.tensor(ids, dtype=torch.int64, device=decoder.device)
    hidden = torch.empty(0, device=decoder.device)
    for one in passes:
        positions = torch.arange(one.start, one.end, device=decoder.device)
        new = decoder.forward(tokens[one.start : one.end], positions, make(one))
        segment.advance(ids[one.start : one.end])
        hidden = torch.cat((hidden[-n_last:], new[-n_last:]))[-n_last:] if hidden.numel() else new[-n_last:]
    return hidden


def _answer(model: LoadedModel, segment: KVSegment, token: int, prompt: Prompt) -> str:
    """Greedy tokens after the prompt, from `token` on, read densely; cut at the first stop string."""
    decoder, eos = model.decoder, set(model.tokenizer.eos_ids)
    slot = Slot.open(Dense(), segment, None, strict=False)
    said: list[int] = []
    try:
        while token not in eos:
            said.append(token)
            text = model.tokenizer.decode(said)
            ended = any(stop in text.lstrip() for stop in prompt.stop)
            if ended or len(said) >= prompt.max_new_tokens:
                break
            slot.position = segment.n_total
            hidden = decoder.forward(torch.tensor([token]), torch.tensor([slot.position]), DecodeBackend([slot]))
            if slot.error is not None:
                raise slot.error
            segment.advance([token])
            token = int(decoder.logits(hidden)[0].argmax())
    finally:
        slot.state.close()
    text = model.tokenizer.decode(said).lstrip()
    return min((text.partition(stop)[0] for stop in prompt.stop), key=len, default=text)


def _likelihood(model: LoadedModel, hidden: Tensor, ids: Sequence[int]) -> float:
    """Geometric mean of the probabilities that hidden [n, hidden] gives to the n tokens after each: 1 / perplexity."""
    scores = torch.log_softmax(model.decoder.logits(hidden), -1)
    found = scores.gather(1, torch.tensor(ids, device=scores.device)[:, None])
    return float(found.double().mean().exp())


def _summary(recorder: Recorder, n_layers: int) -> Measured:
    by_head: dict[str, list[list[float]]] = {}
    everything: dict[str, list[Tensor]] = {"recall": [], "ratio": [], "error": [], "norm": []}
    logs: list[LayerLog] = [recorder.layers[idx] for idx in range(n_layers)]
    for log in logs:
        recall, oracle, error, norm = (
            torch.cat([getattr(part, name) for part in log.rows], 1) for name in ("recall", "oracle", "error", "norm")
        )
        ratio = recall / oracle
        row = {f"recall_{name}": values for name, values in head_summary(recall).items()}
        row |= {
            "density": [kept / log.pairs for kept in log.kept],
            "oracle_ratio": ratio.mean(-1).tolist(),
            "eps": (error.sum(-1) / norm.sum(-1)).sqrt().tolist(),
        }
        for name, values in row.items():
            by_head.setdefault(name, []).append(values)
        for name, part in (("recall", recall), ("ratio", ratio), ("error", error), ("norm", norm)):
            everything[name].append(part.flatten())
    flat = {name: torch.cat(parts) for name, parts in everything.items()}
    overall = {
        "density": sum(sum(log.kept) / len(log.kept) for log in logs) / sum(log.pairs for log in logs),
        "recall_mean": float(flat["recall"].mean()),
        "recall_p5": float(flat["recall"].quantile(0.05)),
        "recall_min": float(flat["recall"].amin()),
        "oracle_ratio": float(flat["ratio"].mean()),
        "eps": float((flat["error"].sum() / flat["norm"].sum()).sqrt()),
    }
    return Measured(by_head, overall, [log.select_s for log in logs], [log.attend_s for log in logs],
                    recorder.map.finished() if recorder.map is not None else None)  # fmt: skip


def measured_json(measured: Measured) -> dict[str, Any]:
    """For a journal: five digits are more than sampling supports."""

    def short(values: Sequence[float]) -> list[float]:
        return [float(f"{value:.5g}") for value in values]

    return {
        "by_head": {name: [short(row) for row in rows] for name, rows in measured.by_head.items()},
        "overall": dict(zip(measured.overall, short(list(measured.overall.values())), strict=True)),
        "select_s": short(measured.select_s),
        "attend_s": short(measured.attend_s),
        "map": None if measured.map is None else measured.map.to_json(),
    }


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
