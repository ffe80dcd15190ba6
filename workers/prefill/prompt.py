"""How one prompt is cut into parts and steps: which tokens go dense or through the method, in chunks or whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from winnow.index.segment import KVSegment
from winnow.types import MethodChoice
from winnow.workers.model.decoder import Decoder
from winnow.workers.prefill.backend import PrefillBackend, Tally, sample_positions
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.break_even import BreakEven


@dataclass(frozen=True)
class Part:
    """Tokens start .. end-1, planned by `method` (None = dense), `chunk` tokens a forward pass (0 = all, layer by layer)."""

    start: int
    end: int
    method: PrefillMethod | None
    chunk: int


def cache_key(method: PrefillMethod) -> str:
    """Under which the KV may be reused: "" = the shared prefix cache, else by exact context under the same method only.

    Exact and prefix-safe methods share; an approximation does not, though it may be prefix-safe, because a dense request
    would otherwise be answered from approximate KV (promise R20).
    """
    caps = method.caps
    if caps.exact and caps.prefix_safe:
        return ""
    params: dict[str, str] = {}
    if dataclasses.is_dataclass(method):
        params = {f.name: str(getattr(method, f.name)) for f in dataclasses.fields(method) if f.init}
    return f"{MethodChoice(method.name, params).spec}@{caps.version}{method.calibration_id}"


def plan_parts(method: PrefillMethod, n: int, cached: int, context: int, chunk: int) -> list[Part]:
    """The parts left to compute of a prompt of n tokens of which the first `cached` are there.

    A method that is not prefix-safe plans over the context alone (the whole prompt where none is named), always from its first
    token: it is steered by the last tokens it sees, so with the question among them the context's KV would serve only it.
    """
    caps = method.caps
    own = chunk if caps.chunked else 0
    planner = None if caps.exact else method
    if caps.prefix_safe:
        parts = [Part(cached, n, planner, own)]
    else:
        border = context or n
        assert cached == 0 or cached >= border, "the store reuses KV of such a method by whole contexts only"
        parts = [Part(cached, border, planner, own), Part(max(cached, border), n, None, chunk)]
    return [part for part in parts if part.start < part.end]


def forward_steps(
    decoder: Decoder, segment: KVSegment, ids: Sequence[int], parts: Sequence[Part], cached: int, n_samples: int, tally: Tally,
    measure_rows: int = 0, break_even: BreakEven | None = None,
) -> Iterator[int]:  # fmt: skip
    """Compute the parts' KV into the segment, a step at a time.

    Args:
        ids: tokens whose KV the segment shall hold.
        n_samples: query vectors to keep in the segment's sample, spread over the computed tokens.
        break_even: of this prompt, see `PrefillBackend`; told between steps what their plans held.
        measure_rows: rows of each layer and pass on which the recall of a method's plan is measured; 0 = not measured.

    Yields:
        Work done in this step, in token-layers. A step is one layer of a part's chunk, or of the whole part where it has none;
        on an accelerator, where a chunk is quick and waiting for it after each layer is not, a step is a chunk.

    Mutates segment and tally. Closing the iterator stops the work.
    """
    tokens = torch.tensor(ids, dtype=torch.int64, device=decoder.device)
    n_layers = decoder.spec.n_layers
    sampled = sample_positions(cached, len(ids), n_samples)
    for part in parts:
        chunk = part.chunk or part.end - part.start
        for start in range(part.start, part.end, chunk):
            end = min(start + chunk, part.end)
            rows = [(position - start, slot) for slot, position in enumerate(sampled) if start <= position < end]
            backend = PrefillBackend(segment, start, part.method, tally, rows, measure_rows, break_even)
            positions = torch.arange(start, end, device=decoder.device)
            by_layer = not part.chunk or decoder.device.type == "cpu"
            if by_layer:
                for layer in decoder.iter_forward(tokens[start:end], positions, backend):
                    if layer + 1 < n_layers:
                        yield end - start
                        _settle(tally, break_even)
            else:
                decoder.forward(tokens[start:end], positions, backend)
            segment.advance(ids[start:end])
            yield (end - start) * (1 if by_layer else n_layers)
            _settle(tally, break_even)


def _settle(tally: Tally, break_even: BreakEven | None) -> None:
    """Read what a step has left on the device. The engine has waited for it by now."""
    tally.settle()
    if break_even is not None:
        break_even.settle()
