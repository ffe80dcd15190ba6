"""A store's counters reach Prometheus, and leave with the store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY

from winnow import telemetry
from winnow.config import KVConfig
from winnow.index.layout import SegmentLayout
from winnow.index.store import SegmentStore


@pytest.mark.promise("R30")
def test_hits_and_evictions_are_counted_where_prometheus_reads_them(tmp_path: Path) -> None:
    layout = SegmentLayout(2, 2, 64, "fp32")
    config = KVConfig(budget_bytes=2 << 20, dir=str(tmp_path))
    store = SegmentStore(layout, "model", config, "metrics", 1, "here")
    before = REGISTRY.get_sample_value("winnow_kv_evictions_total")
    unwatch = telemetry.watch_store(store.stats)
    try:
        first = REGISTRY.get_sample_value("winnow_kv_evictions_total") or 0.0
        for prompt in (0, 0, 1, 2, 3):  # the second is a hit; a prompt takes 0.8 of 2 MiB, so two of the others drop an older one
            tokens = list(range(prompt * 1000, prompt * 1000 + 400))
            lease = store.acquire(tokens, 0)
            if not lease.is_shared:
                rows = torch.zeros(2, 400, 64)
                for layer in range(2):
                    lease.segment.write(layer, 0, rows, rows)
                lease.segment.advance(tokens)
                store.publish(lease)
            store.release(lease.handle)
        assert store.stats().evictions == 2
        assert (REGISTRY.get_sample_value("winnow_kv_evictions_total") or 0.0) - first == 2
        assert REGISTRY.get_sample_value("winnow_kv_hits_total") == store.stats().hits == 1
        assert REGISTRY.get_sample_value("winnow_kv_bytes") == store.stats().bytes
    finally:
        unwatch()
        store.close()
    assert REGISTRY.get_sample_value("winnow_kv_evictions_total") == before
