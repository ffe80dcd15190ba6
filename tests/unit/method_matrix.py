"""Every prefill method as one row: with it, a method enters all property tests of `prefill/test_method_matrix.py`.

A test there checks that no registered method is missing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from winnow.workers.model.spec import ModelSpec, RopeSpec
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.methods.duoattention import DuoAttention, HeadClasses
from winnow.workers.prefill.methods.sea import SEA, Network
from winnow.workers.prefill.methods.seerattention import Gates, SeerAttention
from winnow.workers.prefill.sea_network import Sizes


@dataclass(frozen=True)
class Ties:
    """Parameters under which a method has to choose among equal scores, in square tiles.

    Attributes:
        params: as `Row.params`.
        near: tiles just before a row's own ones that are read whatever the scores; None = the method ranks columns and, apart
            from them, distances, and the lower ones of equal distances are those just before a row's own tile.
    """

    params: dict[str, Any]
    near: int | None = 0


@dataclass(frozen=True)
class Row:
    """One method as it is tested.

    Attributes:
        method: registered name.
        params: parameters small enough that the method selects something on a few hundred tokens.
        dense_limits: parameter sets under which the method must equal dense attention.
        make: for a method that needs what was learnt for a model: make(params, q_heads, kv_heads) returns it with something
            seeded in its place. The heads are numbers of learnt heads: the i-th query head gets what belongs to q_heads[i].
        estimates: whether its plans estimate what they leave out, without being asked to.
        ties: where it chooses among equal scores, or why it never does.
    """

    method: str
    params: dict[str, Any] = field(default_factory=dict)
    dense_limits: tuple[dict[str, Any], ...] = ({},)
    make: Callable[[dict[str, Any], Sequence[int], Sequence[int]], PrefillMethod] | None = None
    estimates: bool = False
    ties: tuple[Ties, ...] | str = field(kw_only=True)


def seerattention(params: dict[str, Any], q_heads: Sequence[int], kv_heads: Sequence[int]) -> PrefillMethod:
    """Seeded random gates for a layer of 4 query and 2 KV heads of 32."""
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 32, 16, generator=gen), torch.randn(1, 2, 96, 16, generator=gen)
    rope = RopeSpec(tuple((1e4 ** -(torch.arange(16) / 16)).tolist()))
    spec = ModelSpec("llama", 1, 128, 128, len(q_heads), len(kv_heads), 32, 8, 4096, (), (rope,), (0,))
    gates = Gates.of({"q": q[:, q_heads], "k": k[:, kv_heads]}, spec, torch.float32, torch.device("cpu"))
    return SeerAttention(**params).with_gates(gates)


def duoattention(params: dict[str, Any], q_heads: Sequence[int], kv_heads: Sequence[int]) -> PrefillMethod:
    """A layer of which one KV head streams and the other does not."""
    method = DuoAttention(**params)
    streaming = torch.tensor([[False, method.sparsity > 0.0]])
    return method.with_classes(HeadClasses.of(streaming[:, kv_heads]))


def sea(params: dict[str, Any], q_heads: Sequence[int], kv_heads: Sequence[int]) -> PrefillMethod:
    """An untrained network for 4 query heads of 32, whose convolutions and gates know the heads apart."""
    sizes = Sizes(4, 32, positions=400, features=16, columns=16)
    found = sizes.initial(seed=0)
    maps = [2 * head + channel for head in q_heads for channel in (0, 1)]
    for name in ("conv1", "conv2"):
        found |= {f"{name}_w": found[f"{name}_w"][maps][:, maps], f"{name}_b": found[f"{name}_b"][maps]}
    found |= {"mix_w": found["mix_w"][list(q_heads)][:, maps], "mix_b": found["mix_b"][list(q_heads)]}
    spec = ModelSpec("llama", 1, 128, 128, len(q_heads), len(kv_heads), 32, 8, 4096, (), (RopeSpec((1.0,)),), (0,))
    tensors = {**{name: tensor[None] for name, tensor in found.items()}, "longest": torch.tensor(sizes.positions)}
    return SEA(**params).with_network(Network.of(tensors, spec, torch.device("cpu")))


METHODS = (
    Row("dense", ties="reads every key"),
    Row(
        "flexprefill",
        params={"block": 32, "min_budget": 64},
        dense_limits=(
            {"min_budget": 1 << 20},
            {"block": 32, "min_budget": 64, "gamma": 1.0, "tau": 0.0},
            {"block": 32, "min_budget": 64, "gamma": 1.0, "tau": 1.0},
            {"block": 32, "min_budget": 64, "gamma": 1.0, "tau": 1.0, "pooling": "bands"},
        ),
        ties=(
            Ties({"block": 32, "min_budget": 64, "gamma": 0.3, "tau": 0.0}, near=None),
            Ties({"block": 32, "min_budget": 64, "gamma": 0.85, "tau": 1.0}, near=1),  # the pooled map, beside two distances
        ),
    ),
    Row(
        "proxyattn",
        params={"block": 32, "min_budget": 64, "gamma": 0.8},
        dense_limits=({"min_budget": 1 << 20}, {"block": 32, "min_budget": 64, "gamma": 1.0}),
        ties=(Ties({"block": 32, "min_budget": 64, "gamma": 0.8}),),
    ),
    Row(
        "xattention",
        params={"block": 32, "threshold": 0.7},
        dense_limits=({"threshold": 1.0}, {"block": 32, "stride": 16, "threshold": 2.0}),
        ties=(Ties({"block": 32, "threshold": 0.7}),),
    ),
    Row(
        "recall",
        params={"block": 32, "every": 8, "recall": 0.7, "rows": 32},
        dense_limits=({"recall": 1.0, "block": 32}, {"block": 32, "every": 8, "recall": 0.9999999, "confidence": 1e3}),
        ties=(Ties({"block": 32, "every": 8, "recall": 0.7, "rows": 32}, near=1),),
    ),
    Row(
        "flashprefill",
        params={"block": 32, "alpha": 0.8, "sink_tiles": 1, "window_tiles": 1, "dense_tail": 1},
        dense_limits=(
            {},
            {"block": 32, "alpha": 0.0, "sink_tiles": 0, "window_tiles": 1, "dense_tail": 0},
            {"block": 32, "alpha": 0.0, "sink_tiles": 0, "window_tiles": 1, "per_kv_head": True},
        ),
        ties="keeps every tile whose score comes near the best one's",
    ),
    Row(
        "prism",  # with bands of one pair its temperatures, which come from the whole prompt, matter on so few tokens
        params={"block": 32, "threshold": 0.75, "high_share": 0.0625, "low_share": 0.0625},
        dense_limits=({"threshold": 1.0, "block": 32}, {"threshold": 1.0}),
        ties=(Ties({"block": 32, "threshold": 0.75, "high_share": 0.0625, "low_share": 0.0625}),),
    ),
    Row(
        "seerattention",
        params={"density": 0.4},
        dense_limits=({"threshold": 0.0}, {"density": 1.0}, {"oracle": True, "threshold": 0.0}),
        make=seerattention,
        ties=(Ties({"density": 0.6}),),
    ),
    Row(
        "duoattention",
        params={"sink": 16, "recent": 48},
        dense_limits=({"sparsity": 0.0, "sink": 16, "recent": 48}, {"recent": 512}, {"sink": 64, "recent": 64, "chunk": 384}),
        make=duoattention,
        ties="its classes of heads are fixed, and so is what each class reads",
    ),
    Row(
        "sale",
        params={"tau": 0.3, "local": 32, "segment": 32, "dense_below": 64},
        dense_limits=({"tau": 0.0}, {"tau": 0.02, "dense_below": 32, "local": 1 << 20}, {"tau": 0.02}),
        ties="keeps every tile whose score exceeds the head's threshold",
    ),
    Row(
        "powerattention",
        params={"block": 32, "local_blocks": 1},
        dense_limits=({"local_blocks": 2}, {"block": 32, "local_blocks": 11, "sink_blocks": 0}),
        ties="its mask is fixed",
    ),
    Row(
        "neighborhood",
        params={"window": 30, "dilation": 11, "stride": 3},
        dense_limits=({"window": 333}, {"window": 352, "stride": 32}),
        ties="its mask is fixed",
    ),
    Row(
        "minference",
        params={"block": 32, "vertical_tokens": 24, "slash_tokens": 40, "sink_tokens": 4, "recent_tokens": 16},
        dense_limits=({}, {"block": 32, "slash_tokens": 1 << 20}),
        ties=(Ties({"block": 32, "vertical_tokens": 80, "slash_tokens": 40, "sink_tokens": 4, "recent_tokens": 16}, near=None),),
    ),
    Row(
        "hyperattention",
        params={"block": 16, "samples": 16, "min_seq_len": 64, "tile": 16, "sink": 16},
        dense_limits=(
            {},
            {"samples": 1 << 20, "block": 16, "min_seq_len": 64, "tile": 16},
            {"samples": 0, "block": 1 << 20, "min_seq_len": 64, "tile": 16},
        ),
        estimates=True,
        ties="its plan reads fixed pieces; what it sorts are rows and keys, into the blocks of its residual",
    ),
    Row(
        "dhsa",
        params={"mask": "vsb", "density": 0.2, "block_q": 32},
        dense_limits=(
            *({"mask": mask, "density": 1.0} for mask in ("topk", "a", "vs", "vsb")),
            *({"mask": mask, "density": 1.0, "pooling": "bands"} for mask in ("topk", "a")),
        ),
        ties=(
            *(Ties({"mask": mask, "density": 0.5, "block_q": 32}) for mask in ("topk", "a")),
            *(Ties({"mask": mask, "density": 0.5, "block_q": 32}, near=None) for mask in ("vs", "vsb")),
        ),
    ),
    Row(
        "dhsa-v1",
        params={"chunk_tokens": 24, "budget": 96, "block": 32, "local": 32, "global_tokens": 8, "instruction": 16},
        dense_limits=({"budget": 333}, {"chunk_tokens": 16, "budget": 1 << 20}),
        ties=(Ties({"chunk_tokens": 24, "budget": 96, "block": 32, "local": 32, "global_tokens": 8, "instruction": 16}),),
    ),
    Row(
        "sea",
        params={"k": 16, "sink": 1},
        dense_limits=({"k": 1 << 20, "mix": False}, {"k": 512, "mix": False}),
        make=sea,
        estimates=True,
        ties="its network tells positions apart where all keys are equal; test_sea.py makes the cells themselves tie",
    ),
)
