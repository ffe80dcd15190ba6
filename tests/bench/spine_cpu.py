"""The spine on CPU with the default model: pipeline against its own engine, engine against transformers, sparse against dense.

    python tests/bench/spine_cpu.py [--quick]

The pipeline is the real one: Ray, the roles as processes, gRPC, shared memory. The engine is the same code called in this
process. transformers runs its SDPA path with the same weights, dtype and threads. Repetitions alternate between a value and
its control, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: two spinning threads starve the other process

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from results import Row, describe_machine, row, write

from winnow.client import Client
from winnow.config import WinnowConfig
from winnow.orchestration.demo.baseline import BM25, mrr_at_10
from winnow.orchestration.demo.documents import known_items
from winnow.orchestration.demo.longtext import CITIES, long_text
from winnow.orchestration.demo.pipeline import own_pipeline
from winnow.types import Generation, Message, Sampling
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_keys, attend_plan
from winnow.workers.attention.lse import merge
from winnow.workers.decode.job import Tokens
from winnow.workers.decode.local_retrieval import LocalRetrieval, SegmentIndex
from winnow.workers.decode.methods.retrieval_attention import RetrievalAttention
from winnow.workers.engine import LocalEngine
from winnow.workers.model.default_model import ensure_default_model
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.reference import DenseBackend
from winnow.workers.prefill.methods.flexprefill import FlexPrefill


def prompt_of(model: LoadedModel, n_tokens: int, start: int = 0) -> tuple[str, list[int]]:
    """Real text whose encoding has exactly n_tokens tokens, and those tokens; another `start` gives another text."""
    encode = model.tokenizer.encode
    ids = encode(long_text(n_tokens + start + 64, lambda t: len(encode(t))).text)[start:]
    for extra in range(64):  # a cut may re-encode to a token more or less: move it until it does not
        text = model.tokenizer.decode(ids[: n_tokens + extra])
        if len(model.tokenizer.encode_prompt(text)) == n_tokens:
            return text, model.tokenizer.encode_prompt(text)
    raise RuntimeError(f"no cut of the text has exactly {n_tokens} tokens")


def engine_times(engine: LocalEngine, ids: list[int], max_tokens: int) -> list[float]:
    """Seconds from the call to each token, no cache."""
    start = time.perf_counter()
    events = engine.generate(ids, Sampling(max_tokens=max_tokens, ignore_eos=True), no_cache=True)
    return [time.perf_counter() - start for event in events if isinstance(event, Tokens) and event.token_ids]


def pipeline_times(client: Client, text: str, max_tokens: int, **options: Any) -> list[float]:
    """Seconds from the call to each token, at the client."""
    start = time.perf_counter()
    chunks = client.generate(text, sampling=Sampling(max_tokens=max_tokens, ignore_eos=True), **options)
    return [time.perf_counter() - start for chunk in chunks if chunk.token_ids]


def per_token_ms(times: list[float]) -> float:
    return (times[-1] - times[0]) / (len(times) - 1) * 1e3


def alternate(n: int, *runs: Callable[[int], float]) -> list[list[float]]:
    """n values of each run, taken in turn."""
    values: list[list[float]] = [[] for _ in runs]
    for i in range(n):
        for run, kept in zip(runs, values, strict=True):
            kept.append(run(i))
    return values


def engine_rows(model: LoadedModel, engine: LocalEngine, folder: Path, n: int) -> Iterator[Row]:
    """The engine beside transformers: same weights, dtype and threads."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.decoder.dtype, attn_implementation="sdpa").eval()

    def generate(ids: list[int], new: int) -> float:
        tokens = torch.tensor([ids])
        start = time.perf_counter()
        with torch.inference_mode():
            peer.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - start

    _, long = prompt_of(model, 4096)
    _, short = prompt_of(model, 1024)
    generate(short, 2)
    engine_times(engine, short, 2)
    often = 2 * n + 1  # the two are level, and runs of the same work lie 10 % apart
    ours, theirs = alternate(often, lambda _: engine_times(engine, long, 1)[0], lambda _: generate(long, 1))
    yield row("engine_prefill_4k", ours, "s", "transformers generate (SDPA)", theirs, "time to the first token")
    new = 33
    ours, theirs = alternate(
        often,
        lambda _: per_token_ms(engine_times(engine, short, new)),
        lambda _: (generate(short, new) - generate(short, 1)) / (new - 1) * 1e3,
    )
    yield row("engine_decode_1k", ours, "ms/token", "transformers generate (SDPA)", theirs)


def pipeline_rows(model: LoadedModel, engine: LocalEngine, client: Client, n: int) -> Iterator[Row]:
    """The pipeline beside the engine, and its cache and batching beside itself."""
    text, ids = prompt_of(model, 4096)
    short_text, short_ids = prompt_of(model, 1024)
    pipeline_times(client, short_text, 2, no_cache=True)
    ours, control = alternate(
        n, lambda _: pipeline_times(client, text, 1, no_cache=True)[0], lambda _: engine_times(engine, ids, 1)[0]
    )
    yield row("pipeline_ttft_4k", ours, "s", "the same engine in process", control)
    ours, control = alternate(
        2 * n + 1,
        lambda _: per_token_ms(pipeline_times(client, short_text, 48, no_cache=True)),
        lambda _: per_token_ms(engine_times(engine, short_ids, 48)),
    )
    added = statistics.median(ours) - statistics.median(control)
    yield row("pipeline_tpot", ours, "ms/token", "the same engine in process", control, f"{added:+.2f} ms a token")
    texts = [prompt_of(model, 4096, start=256 * (i + 1))[0] for i in range(min(n, 2))]
    cold, hit = alternate(
        len(texts), lambda i: pipeline_times(client, texts[i], 1)[0], lambda i: pipeline_times(client, texts[i], 1)[0]
    )
    yield row("prefix_hit_ttft_4k", hit, "s", "the same prompt, cold", cold)
    yield throughput(model, client, n)


def throughput(model: LoadedModel, client: Client, n: int, streams: int = 8, new: int = 48) -> Row:
    """Tokens a second while all streams decode: each counts its tokens after its own first one."""
    texts = [prompt_of(model, 256, start=64 * i)[0] for i in range(streams)]
    for text in texts:
        pipeline_times(client, text, 1)  # prompts in the cache: this measures decoding

    def rate(count: int) -> float:
        times: list[list[float]] = [[] for _ in range(count)]
        begin = time.perf_counter()

        def one(i: int) -> None:
            offset = time.perf_counter() - begin
            times[i] = [offset + t for t in pipeline_times(client, texts[i], new)]

        threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first, last = min(t[0] for t in times), max(t[-1] for t in times)
        return sum(len(t) - 1 for t in times) / (last - first)

    eight, one = alternate(n, lambda _: rate(streams), lambda _: rate(1))
    return row("throughput_8", eight, "tokens/s", "one generation", one, f"{streams} at once, 256-token prompts")


def agreement_rows(model: LoadedModel, client: Client, lengths: list[int], seeds: int) -> Iterator[Row]:
    """Sparse prefill plus KV retrieval beside dense on chats about a text with a planted fact, long enough to run sparse."""
    for n_tokens in lengths:
        same, dense_right, sparse_right, density, keys = [], [], [], [], []
        for seed in range(seeds):
            paragraphs = prompt_of(model, n_tokens, start=200 * seed)[0].split("\n\n")
            city, number = CITIES[seed % len(CITIES)], str(1_000_003 * (seed + 3))
            stem = f"The special magic number for {city} is: "
            paragraphs.insert(len(paragraphs) * (seed + 1) // (seeds + 1), f"{stem}{number}.")
            text = "\n\n".join(paragraphs)
            messages = [Message("user", f"{text}\n\nWhat is the special magic number for {city}?")]

            def ask(prefill: str, decode: str, messages: list[Message] = messages, stem: str = stem) -> Generation:
                return client.complete(
                    messages=messages, answer_prefix=stem, max_tokens=8, no_cache=True, prefill=prefill, decode=decode
                )

            dense, sparse = ask("dense", "dense"), ask("flexprefill", "retrieval-attention")
            same.append(float(dense.token_ids == sparse.token_ids))
            dense_right.append(float(number in dense.text))
            sparse_right.append(float(number in sparse.text))
            density.append(sparse.usage.prefill_density)
            keys.append(sparse.usage.keys_read_share)
        if min(density) == 1.0:
            raise RuntimeError(f"a prompt of {n_tokens} tokens ran dense: nothing would be compared")
        ones, mean = [1.0] * seeds, statistics.fmean
        note = f"{seeds} chats about {n_tokens} tokens, flexprefill + retrieval-attention, 8 greedy tokens"
        at = f"{n_tokens // 1000}k"
        yield row(f"sparse_agreement_{at}", [mean(same)], "share", "dense", [mean(ones)], "identical answers; " + note)
        if any(dense_right):
            right = [mean(sparse_right)], "share", "dense", [mean(dense_right)]
            yield row(f"sparse_needle_{at}", *right, "planted fact found; " + note)
        yield row(f"sparse_density_{at}", density, "share", "dense", ones, "kept / causal pairs of the prefill; " + note)
        yield row(f"sparse_keys_read_{at}", keys, "share", "dense", ones, "keys read / cached while decoding; " + note)


def ranking_rows(client: Client, n_documents: int, n_queries: int) -> Iterator[Row]:
    """Every ranker beside BM25 on known-item queries: a docstring's first sentence -> its rest."""
    items = known_items(n_documents)
    documents = [item.document for item in items]
    asked = items[:: max(1, len(items) // n_queries)][:n_queries]
    right = [item.document.doc_id for item in asked]
    bm25 = BM25(documents)
    base = mrr_at_10([[doc_id for doc_id, _ in bm25.rank(item.query)] for item in asked], right)
    for method in ("likelihood", "icr"):
        seconds, found = [], []
        for item in asked:
            start = time.perf_counter()
            ranking = client.rank(item.query, documents, method=method)
            seconds.append(time.perf_counter() - start)
            found.append([one.doc_id for one in ranking.items])
        note = f"{len(asked)} queries, {len(documents)} documents; median {statistics.median(seconds):.2f} s a query"
        yield row(f"rank_{method}_mrr10", [mrr_at_10(found, right)], "MRR@10", "BM25", [base], note)


class MassBackend:
    """Dense attention that also works out how much of its mass the sparse methods would have read, from their LSEs.

    Args:
        index: search it for each query (decode), over a segment of `sealed` tokens; None = FlexPrefill's plan (prefill).
    """

    def __init__(self, dense: DenseBackend, index: SegmentIndex | None = None, sealed: int = 0) -> None:
        self.dense, self.sealed = dense, sealed
        self.retrieval = LocalRetrieval(index) if index else None
        self.method = RetrievalAttention()
        self.recalls: list[float] = []

    def attend(self, layer: LayerSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, raw: RawQK) -> torch.Tensor:
        out = self.dense.attend(layer, q, k, v, raw)
        end = self.dense.n_cached[layer.idx]
        keys, values = self.dense.k[layer.idx][:, :end], self.dense.v[layer.idx][:, :end]
        if self.retrieval is None:
            plan = FlexPrefill().plan(q[None], keys[None], layer, raw)
            _, kept = attend_plan(plan, q[None], keys[None], values[None], scale=layer.scale)
            _, full = attend_plan(None, q[None], keys[None], values[None], scale=layer.scale)
        else:
            query = q[:, 0]
            self.retrieval.submit(layer, query, self.method.top_k)
            sink, recent = self.method.sink_tokens, self.sealed - self.method.recent_tokens
            near = torch.cat((keys[:, :sink], keys[:, recent:]), 1)
            near_v = torch.cat((values[:, :sink], values[:, recent:]), 1)
            out_w, lse_w = attend_keys(query, near, near_v, scale=layer.scale)
            found = self.retrieval.collect(layer)
            _, kept = merge([out_w, found.out], [lse_w, found.lse])
            _, full = attend_keys(query, keys, values, scale=layer.scale)
        self.recalls.append(float((kept - full).exp().mean()))
        return out


def recall_rows(model: LoadedModel, engine: LocalEngine, n_tokens: int) -> Iterator[Row]:
    """Attention mass that the sparse methods keep, per layer, on a dense pass over real text."""
    _, ids = prompt_of(model, n_tokens)
    spec, decoder = model.spec, model.decoder
    dense = DenseBackend(spec, n_tokens + 8, decoder.dtype)
    prefill = MassBackend(dense)
    with torch.inference_mode():
        decoder.forward(torch.tensor(ids[:-1]), torch.arange(n_tokens - 1), prefill)
        note = f"median over {spec.n_layers} layers of the mean over heads and rows; {n_tokens} tokens of text"
        yield row("sparse_mass_recall_prefill", prefill.recalls, "share", "dense", [1.0], "flexprefill; " + note)
        events = engine.generate(ids, Sampling(max_tokens=1), no_cache=True)
        result: Any = next(events)
        method = RetrievalAttention()
        index = SegmentIndex(result.lease.segment, "flat", method.sink_tokens, method.recent_tokens)
        decode = MassBackend(dense, index, n_tokens - 1)
        token = ids[-1]
        for step in range(6):
            hidden = decoder.forward(torch.tensor([token]), torch.tensor([n_tokens - 1 + step]), decode)
            token = int(decoder.logits(hidden)[0].argmax())
        events.close()
    yield row("sparse_mass_recall_decode", decode.recalls, "share", "dense", [1.0], "retrieval-attention, 6 steps; " + note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one repetition of everything; not for committing")
    quick = parser.parse_args().quick
    n = 1 if quick else 3
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    folder = ensure_default_model()
    model = load_model("default")
    rows: list[Row] = []

    def keep(found: Iterator[Row]) -> None:
        for one in found:
            rows.append(one)
            print(f"{one.name}: {one.value:.4g} {one.unit}, ratio {one.ratio:.3f}", flush=True)

    with LocalEngine(model, WinnowConfig()) as engine:
        keep(engine_rows(model, engine, folder, n))
        keep(recall_rows(model, engine, 2048 if quick else 4096))
        with (
            own_pipeline(str(folder), single=False, on_progress=print) as state,
            Client(address=state.address, token=state.token) as client,
        ):
            keep(pipeline_rows(model, engine, client, n))
            keep(agreement_rows(model, client, [4096] if quick else [4096, 7000], 1 if quick else 4))
            keep(ranking_rows(client, 100, 3 if quick else 25))
    write("spine_cpu.json", rows, machine=f"{describe_machine()}, {model.dtype_name}")


if __name__ == "__main__":
    main()
