"""A decode step on CUDA without its launch costs: everything between two attentions is replayed as one CUDA graph.

A step of an 8B model issues about a thousand small operations, and Python needs longer to issue them than the device to run
them. Attention stays outside the graphs, since backends differ and their work grows with the cache. Source: the
"piecewise" graphs of vLLM, in our own words.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.workers.attention.backend import AttentionBackend, RawQK

if TYPE_CHECKING:
    from winnow.workers.model.decoder import Decoder, Heads

SIZES = (1, 2, 4, 8, 16)  # tokens of a step; others are padded to the next one


@dataclass
class _Recorded:
    """Graphs of one size and the tensors they read and write. Segment i ends with layer i's q, k and v."""

    tokens: Tensor
    positions: Tensor
    mixed: Tensor  # [T, Hq * D], what attention returned
    segments: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    hidden: Tensor | None = None


class GraphedSteps:
    """Runs whole forward passes of at most `SIZES[-1]` tokens. One pass at a time: a second thread is told to go without.

    The q, k and v a backend is handed live until the next layer: it copies what it keeps, as its contract says.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._recorded: dict[int, _Recorded] = {}
        self._lock = threading.Lock()
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def try_forward(self, tokens: Tensor, positions: Tensor, backend: AttentionBackend) -> Tensor | None:
        """As `Decoder.forward` with all layers; None when another thread is in the middle of a pass."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            n = tokens.shape[0]
            size = next(size for size in SIZES if size >= n)
            recorded = self._recorded.get(size)
            if recorded is None:
                gc.collect()  # graphs of a decoder that is gone must not be freed in the middle of a recording
                was_enabled = gc.isenabled()
                gc.disable()
                try:
                    recorded = self._recorded[size] = self._record(size)
                finally:
                    if was_enabled:
                        gc.enable()
            torch.cuda.current_stream().wait_event(self._done)  # the last pass may have run on another stream
            hidden = self._replay(recorded, tokens, positions, backend)
            self._done.record()
            return hidden
        finally:
            self._lock.release()

    def _replay(self, r: _Recorded, tokens: Tensor, positions: Tensor, backend: AttentionBackend) -> Tensor:
        n = tokens.shape[0]
        r.tokens[:n].copy_(tokens)
        r.positions[:n].copy_(positions)
        for layer, graph, heads in zip(self._decoder.spec.layers, r.segments, r.heads, strict=False):
            graph.replay()
            raw = RawQK(heads.raw_q[:, :n], heads.raw_k[:, :n])
            out = backend.attend(layer, heads.q[:, :n], heads.k[:, :n], heads.v[:, :n], raw)
            r.mixed[:n].view(n, out.shape[0], out.shape[2]).copy_(out.transpose(0, 1))
        r.segments[-1].replay()
        assert r.hidden is not None
        return r.hidden[:n].clone()

    def _record(self, size: int) -> _Recorded:
        decoder, spec = self._decoder, self._decoder.spec
        zeros = torch.zeros(size, dtype=torch.long, device=decoder.device)
        mixed = torch.zeros(size, spec.n_q_heads * spec.head_size, dtype=decoder.dtype, device=decoder.device)
        r = _Recorded(zeros, zeros.clone(), mixed)
        decoder.begin(r.tokens, r.positions)  # builds the rotary tables, which must not happen inside a graph
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        state: dict[str, Tensor] = {}
        ropes: list[tuple[tuple[Tensor, Tensor], ...]] = []

        def first() -> Heads:
            state["x"], rows = decoder.begin(r.tokens, r.positions)
            ropes[:] = [rows]
            return decoder.project(0, decoder.norm_before_attention(0, state["x"]), rows)

        def middle(idx: int) -> Heads:
            decoder.finish_layer(idx - 1, state["x"], decoder.project_out(idx - 1, r.mixed))
            return decoder.project(idx, decoder.norm_before_attention(idx, state["x"]), ropes[0])

        def last() -> Tensor:
            decoder.finish_layer(spec.n_layers - 1, state["x"], decoder.project_out(spec.n_layers - 1, r.mixed))
            return decoder.final_norm(state["x"])

        with torch.cuda.stream(side):
            first()  # libraries choose and load their kernels on first use, outside a graph
            last()
            pool = torch.cuda.graph_pool_handle()
            steps: list[Callable[[], Heads]] = [first, *((lambda i=i: middle(i)) for i in range(1, spec.n_layers))]
            for step in steps:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    r.heads.append(step())
                r.segments.append(graph)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                r.hidden = last()
            r.segments.append(graph)
        torch.cuda.current_stream().wait_stream(side)
        return r
