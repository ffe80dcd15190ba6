"""Tiny real models, stores in a temporary folder, and an inbox that waits for events."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.config import DecodeConfig, KVConfig, PrefillConfig, WinnowConfig
from winnow.index.store import SegmentStore
from winnow.types import Sampling
from winnow.workers.decode.job import DecodeJob, Tokens
from winnow.workers.decode.worker import DecodeEngine
from winnow.workers.engine import make_store
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill.job import Handle, PrefillJob, PrefillResult
from winnow.workers.prefill.worker import PrefillEngine

WAIT_S = 60


@dataclass
class Inbox:
    """Receives a job's events. `until` blocks for the first event of a kind; everything seen stays in `seen`."""

    events: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    seen: list[Any] = field(default_factory=list)

    def __call__(self, event: Any) -> None:
        self.events.put(event)

    def next(self) -> Any:
        event = self.events.get(timeout=WAIT_S)
        self.seen.append(event)
        return event

    def until(self, *kinds: type) -> Any:
        while True:
            event = self.next()
            if isinstance(event, kinds):
                return event
            assert type(event).__name__ != "Failed", event

    def tokens(self) -> list[int]:
        """All tokens up to the last event; sequence numbers are checked."""
        ids: list[int] = []
        for expected in range(1 << 20):
            event = self.until(Tokens)
            assert event.sequence == expected
            ids += event.token_ids
            if event.finish_reason:
                break
        return ids


class Rig:
    """A prefill and a decode engine over one store, with one model."""

    def __init__(self, model: LoadedModel, folder: Path, prefill: PrefillConfig, decode: DecodeConfig, block_tokens: int) -> None:
        config = WinnowConfig(kv=KVConfig(dir=str(folder), budget_bytes=256 << 20, block_tokens=block_tokens))
        self.model = model
        self.store: SegmentStore = make_store(model, config, owner="prefill-0", epoch=1)
        self.prefill = PrefillEngine(model, self.store, prefill)
        self.decode = DecodeEngine(model, decode)
        self.results: list[PrefillResult] = []

    def run_prefill(self, ids: list[int], **fields: Any) -> PrefillResult:
        inbox = Inbox()
        self.prefill.submit(PrefillJob("r", ids, **{"tail_tokens": 64, **fields}), inbox)
        result = inbox.until(PrefillResult)
        self.results.append(result)
        return result

    def start_decode(self, ids: list[int], sampling: Sampling, result: PrefillResult | None = None, **fields: Any
                     ) -> tuple[Inbox, Any]:  # fmt: skip
        result = result or self.run_prefill(ids, tail_tokens=sampling.max_tokens)
        inbox = Inbox()
        return inbox, self.decode.submit(DecodeJob("r", result.lease.segment, ids[-1], sampling, **fields), inbox)

    def generate(self, ids: list[int], n: int = 24, method: Any = None, **fields: Any) -> list[int]:
        """Greedy tokens."""
        result = self.run_prefill(ids, tail_tokens=n, method=method, **fields)
        inbox, _ = self.start_decode(ids, Sampling(max_tokens=n), result)
        return inbox.tokens()

    def release_all(self) -> None:
        for result in self.results:
            self.store.release(result.segment)
        self.results.clear()

    def assert_idle(self) -> None:
        """Ledgers are zero and the store is whole: nothing is running, waiting or leased."""
        prefill, decode = self.prefill.load(), self.decode.load()
        assert (prefill.running, prefill.waiting, decode.running, decode.waiting) == (0, 0, 0, 0)
        assert self.store.stats().leases == 0
        self.store.check()


def wait(handle: Handle | Any) -> None:
    assert handle.finished.wait(WAIT_S)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedModel]:
    """tiny(family) -> a loaded float32 model; tiny.folder(family) is where it lies."""
    folders: dict[str, Path] = {}
    models: dict[str, LoadedModel] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = make_tiny_model(tmp_path_factory.mktemp(family) / family, family)
        return folders[family]

    def load(family: str = "llama") -> LoadedModel:
        if family not in models:
            models[family] = load_model(str(folder(family)), dtype="fp32", device="cpu")
        return models[family]

    load.folder = folder  # type: ignore[attr-defined]
    return load


@pytest.fixture
def rig(tiny: Callable[..., LoadedModel], tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """rig(family, chunk_tokens=…, max_batch=…) -> a started Rig; stopped and checked for leaks afterwards."""
    rigs: list[Rig] = []

    def make(family: str = "llama", *, chunk_tokens: int = 64, max_waiting: int = 64, max_batch: int = 16, block_tokens: int = 16,
             started: bool = True, break_even: bool = False, sparse_chunk_tokens: int = 0, dense_tail_tokens: int = 0,
             model: LoadedModel | None = None) -> Rig:  # fmt: skip
        folder = tmp_path / f"kv{len(rigs)}"
        folder.mkdir()
        made = Rig(
            model or tiny(family), folder,
            PrefillConfig(
                chunk_tokens=chunk_tokens, sparse_chunk_tokens=sparse_chunk_tokens, dense_tail_tokens=dense_tail_tokens,
                max_waiting=max_waiting, break_even=break_even,
            ),
            DecodeConfig(max_batch=max_batch, max_waiting=max_waiting), block_tokens,
        )  # fmt: skip
        rigs.append(made)
        if started:
            made.prefill.start()
            made.decode.start()
        return made

    yield make
    for made in rigs:
        made.decode.stop()
        made.prefill.stop()
        made.release_all()
        made.assert_idle()
        made.store.close()


def prompt(n: int, seed: int = 0) -> list[int]:
    """n token ids of the tiny vocabulary, none of them an end-of-sequence token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (n,), generator=generator).tolist()
