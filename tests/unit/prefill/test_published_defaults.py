"""Defaults are the published ones: what a method's paper and code set, a plain `create(name)` or `calibrate` does.

Left out is what is our own choice (tile sizes of our executor, seeds, dhsa's mask, how long a training is and on how much text)
and what differs on purpose, as docstrings say: the width of SeerAttention's gates, the sink and window that DuoAttention learns
with, the rates of SEA's and dhsa-v1's trainings.
"""

from __future__ import annotations

import importlib

import pytest

from winnow.workers.prefill.base import prefill_methods
from winnow.workers.prefill.training import _MODULES

METHODS: dict[str, dict[str, object]] = {
    "dhsa": {"density": 0.125, "split": 0.5, "block_q": 128, "block_k": 32, "pooling": "mean"},
    "dhsa-v1": {
        "budget": 2048,
        "block": 128,
        "local": 128,
        "global_tokens": 128,
        "instruction": 64,
        "threshold": 1.1,
        "apart": 8,
        "borders_per_block": 8,
        "chunk_tokens": 0,
    },
    "duoattention": {"sparsity": 0.5, "sink": 64, "recent": 256},
    "flashprefill": {"alpha": 0.1, "sink_tiles": 2, "window_tiles": 4, "dense_tail": 2, "dense_layers": 0, "block": 128},
    "flexprefill": {
        "gamma": 0.9,
        "tau": 0.1,
        "min_budget": 1024,
        "max_budget": 0,  # none
        "block": 128,
        "pooling": "mean",
        "adjacent_diagonals": False,
    },
    "hyperattention": {"bits": 7, "block": 256, "samples": 256, "min_seq_len": 4096, "sink": 0, "per_head": False},
    "minference": {
        "vertical_tokens": 1000,
        "slash_tokens": 6096,
        "sink_tokens": 30,
        "recent_tokens": 100,
        "probe_rows": 64,
        "block": 64,
    },
    "neighborhood": {"dilation": 1, "stride": 1},
    "powerattention": {"block": 256, "local_blocks": 5, "sink_blocks": 1},
    "prism": {"threshold": 0.95, "high_share": 64 / 128, "low_share": 96 / 128, "block": 128},
    "proxyattn": {
        "gamma": 0.95,
        "groups": 1,
        "stride": 4,
        "min_budget": 2048,
        "block": 128,
        "row_scaled": True,
        "keep_first": True,
    },
    "sale": {
        "tau": -1.0,  # each head's own
        "bits": 4,
        "token_scales": False,
        "sink": 32,
        "local": 128,
        "segment": 128,
        "dense_below": 1024,
    },
    "sea": {"k": 64, "oversample": 1.0, "sink": 0, "mix": True},
    "seerattention": {"threshold": 2e-3, "density": 0.0, "oracle": False},
    "xattention": {"stride": 8, "threshold": 0.9, "block": 128},
}
TRAININGS: dict[str, dict[str, object]] = {
    "dhsa-v1": {"epochs": 2, "reach": 4},
    "duoattention": {"rate": 0.02, "l1": 0.05},
    "sale": {"theta": 0.4, "start": 0.008, "floor": 1e-4, "prompts": 5},
    "sea": {"k": 64, "columns": 128, "factor": 8},
    "seerattention": {"steps": 500, "batch": 16, "rate": 1e-3},
}
CONSTANTS: dict[str, dict[str, object]] = {  # published numbers that no option changes, by module
    "methods.sale": {"BLOCK_Q": 64, "BLOCK_K": 32, "DENSE_TAU": 1e-5},
    "methods.seerattention": {"BLOCK": 64},
    "training.dhsa_v1": {"_FOCUS": 2.0},
    "training.sea": {"_KL_WEIGHT": 0.1},
    "training.seerattention": {"_LOSS_WEIGHT": 10.0, "_WARM_UP": 20},
}
OWN = {"dense", "recall"}


@pytest.mark.parametrize(
    ("where", "published"),
    [
        *(pytest.param(("method", name), values, id=name) for name, values in METHODS.items()),
        *(pytest.param(("training", name), values, id=f"{name} training") for name, values in TRAININGS.items()),
        *(pytest.param(("module", name), values, id=name) for name, values in CONSTANTS.items()),
    ],
)
def test_a_default_is_the_published_value(where: tuple[str, str], published: dict[str, object]) -> None:
    kind, name = where
    holder: object
    if kind == "method":
        holder = prefill_methods.create(name, {})
    elif kind == "training":
        holder = importlib.import_module(f"winnow.workers.prefill.training.{_MODULES[name]}").Options()
    else:
        holder = importlib.import_module(f"winnow.workers.prefill.{name}")
    assert {key: getattr(holder, key) for key in published} == published


def test_every_published_method_and_training_is_listed() -> None:
    shipped = {entry.name for entry in prefill_methods if entry.cls and entry.cls.__module__.startswith("winnow.")}
    assert set(METHODS) == shipped - OWN
    assert set(TRAININGS) == set(_MODULES)
