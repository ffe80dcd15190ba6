"""How one prompt is cut into passes and steps: which tokens go dense or through the method, in chunks or whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from winnow.config import PrefillConfig
from winnow.index.segment import KVSegment
from winnow.types import MethodChoice
from winnow.workers.model.decoder import Decoder
from winnow.workers.prefill.backend import PrefillBackend, Tally, sample_positions
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.break_even import BreakEven
from winnow.workers.prefill.scoring import on_device


@dataclass(frozen=True)
class Pass:
    """Tokens start .. end-1 in one forward pass. The first `planned` of them are planned by `method` (None = dense), the rest
    is dense."""

    start: int
    end: int
    method: PrefillMethod | None = None
    planned: int = 0


def cache_key(method: PrefillMethod) -> str:
    """Under which the KV may be reused: "" = the shared prefix cache, else by the same method only.

    An approximation does not share, whatever it is steered by: a dense request would be answered from approximate KV
    (promise R20).
    """
    if method.caps.exact:
        return ""
    params: dict[str, str] = {}
    if dataclasses.is_dataclass(method):
        params = {f.name: str(getattr(method, f.name)) for f in dataclasses.fields(method) if f.init}
    return f"{MethodChoice(method.name, params).spec}@{method.caps.version}{method.calibration_id}"


def sparse_chunk_tokens(config: PrefillConfig, device: torch.device) -> int:
    """Tokens that a sparse method plans at a time. Where the configuration leaves it open, on an accelerator more: choosing costs
    much the same there for a chunk of any length, while on a CPU a chunk of 4,096 already takes seconds."""
    return config.sparse_chunk_tokens or (4096 if device.type == "cpu" else 16384)


def planned_tokens(method: PrefillMethod, n: int, context: int, tail: int) -> int:
    """How many of a prompt's first tokens a method plans; the rest is dense.

    They are the context where one is named, because with the question among them its KV would serve only that question; else
    all but the last `tail`, or all of a prompt that is no longer than this. The end of a prompt is where it says what is wanted:
    its rows decide the answer, and what they miss does not average out over the others.
    """
    if context:
        return context
    return n - tail if not method.caps.exact and n > tail else n


def plan_passes(method: PrefillMethod, n: int, cached: int, context: int, chunk: int, tail: int) -> list[Pass]:
    """The passes left to compute of a prompt of n tokens of which the first `cached` are there.

    A sparse method plans chunk by chunk, from a chunk's queries and all keys up to its end. So whatever steers it, the KV of
    whole chunks depends on no later token, and serves every prompt that begins with them. A context ends in a pass of its own,
    so that its KV is the same under every question; a tail is reused by nobody and shares the pass of the rows before it.

    Args:
        context, tail: see `planned_tokens`.
        chunk: tokens of a pass; 0 = no limit.
    """
    border = 0 if method.caps.exact else planned_tokens(method, n, context, tail)
    ends = [n] if method.caps.exact or not context else [context, n]
    passes, start = [], cached
    for end in ends:
        while start < end:
            stop = min(end, start + (chunk or end))
            planned = max(0, min(stop, border) - start)
            assert not planned or start % (chunk or n) == 0, "KV is reused by whole chunks"
            passes.append(Pass(start, stop, method if planned else None, planned))
            start = stop
    return passes


def forward_steps(
    decoder: Decoder, segment: KVSegment, ids: Sequence[int], passes: Sequence[Pass], n_samples: int, tally: Tally,
    measure_rows: int = 0, break_even: BreakEven | None = None, *, by_layer: bool = True,
) -> Iterator[int]:  # fmt: skip
    """Compute the passes' KV into the segment, a step at a time.

    Args:
        ids: tokens whose KV the segment shall hold.
        n_samples: query vectors to keep in the segment's sample, spread over the computed tokens.
        break_even: of this prompt, see `PrefillBackend`. It begins anew with each chunk, so that a chunk's KV is the same
            whether those before it were computed or taken from the cache.
        measure_rows: rows of each layer and pass on which the recall of a method's plan is measured; 0 = not measured.
        by_layer: a step is one layer of a pass, else a pass: on an accelerator a chunk is quick, and waiting after each layer
            is not.

    Yields:
        Work done in this step, in token-layers.

    Mutates segment and tally. Closing the iterator stops the work.
    """
    tokens = torch.tensor(ids, dtype=torch.int64, device=decoder.device)
    n_layers = decoder.spec.n_layers
    sampled = sample_positions(passes[0].start if passes else len(ids), len(ids), n_samples)
    for one in passes:
        start, end = one.start, one.end
        slots = [slot for slot, position in enumerate(sampled) if start <= position < end]  # in one piece: positions ascend
        rows = on_device(torch.tensor([sampled[slot] - start for slot in slots]), decoder.device) if slots else None
        if break_even is not None:
            break_even.begin_chunk()
        backend = PrefillBackend(
            segment, start, one.method, tally, one.planned, rows, slots[0] if slots else 0, measure_rows, break_even
        )
        positions = torch.arange(start, end, device=decoder.device)
        for layer in decoder.iter_forward(tokens[start:end], positions, backend):
            if by_layer and layer + 1 < n_layers:
                yield end - start
                tally.settle()
        segment.advance(ids[start:end])
        yield (end - start) * (1 if by_layer else n_layers)
        tally.settle()  # the engine has waited for the device by now
