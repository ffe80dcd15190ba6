"""Tiny real models whose attention is known because their weights were written by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.tiny import make_tiny_model

HIDDEN, SIZE, CODE, THETA = 128, 32, 20, 1e8
N_TOPICS = 4


def induction_model(folder: Path) -> LoadedModel:
    """Two layers of two heads; head (1, 0) looks for earlier places of the current token, the others look 1, 3 and 2 back.

    Hidden states: dims 0..19 a token's code, 32 a constant, 40..59 the code of the token before, written by head (0, 0), which
    head (1, 0) compares with the current code; 64..127 outputs.
    """
    rope = {"rope_type": "default", "rope_theta": THETA}
    make_tiny_model(folder, hidden_size=HIDDEN, num_attention_heads=2, num_key_value_heads=2, head_dim=SIZE, rope_parameters=rope)
    file = folder / "model.safetensors"
    weights = load_file(file)
    gen = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        weight.fill_(1.0) if "norm" in name else weight.zero_()
    embed = weights["model.embed_tokens.weight"]
    embed[:, :CODE] = torch.nn.functional.normalize(torch.randn(embed.shape[0], CODE, generator=gen), dim=-1)
    embed[:, 32] = 1.0
    weights["lm_head.weight"].normal_(generator=gen)
    looks_back(weights, 0, 0, distance=1)
    looks_back(weights, 0, 1, distance=3)
    looks_back(weights, 1, 1, distance=2)
    passes_on(weights, 0, 0, torch.eye(CODE), source=0, target=40, gain=1.0)
    for layer, head in ((0, 1), (1, 1)):
        passes_on(weights, layer, head, torch.randn(CODE, CODE, generator=gen) / CODE**0.5, source=0, target=64, gain=0.4)
    slow = torch.cat((torch.arange(6, 16), torch.arange(22, 32)))  # pairs that hardly turn within a prompt
    weights["model.layers.1.self_attn.q_proj.weight"][slow, torch.arange(CODE)] = 1.5
    weights["model.layers.1.self_attn.k_proj.weight"][slow, torch.arange(CODE) + 40] = 1.5
    passes_on(weights, 1, 0, torch.eye(CODE), source=0, target=96, gain=2.0)
    save_file(weights, file, metadata={"format": "pt"})
    return load_model(str(folder), device="cpu", dtype="fp32")


def looks_back(weights: dict[str, Tensor], layer: int, head: int, distance: int) -> None:
    """Make q and k of a head constants whose rotated product peaks at this distance."""
    q, k = (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"][head * SIZE : (head + 1) * SIZE] for name in "qk")
    for pair in range(4):
        angle = distance * THETA ** (-pair / (SIZE // 2))
        q[pair, 32], q[pair + SIZE // 2, 32] = 1.6 * math.cos(angle), -1.6 * math.sin(angle)
        k[pair, 32] = 1.6


def passes_on(
    weights: dict[str, Tensor], layer: int, head: int, through: Tensor, *, source: int, target: int, gain: float
) -> None:
    """Let a head write what stands in the dims from `source` of the tokens it reads, times `through`, to those from `target`."""
    normed = math.sqrt(HIDDEN / (2.0 if layer == 0 else 3.2))  # what RMSNorm multiplies with, about
    weights[f"model.layers.{layer}.self_attn.v_proj.weight"][head * SIZE : head * SIZE + CODE, source : source + CODE] = through
    columns = weights[f"model.layers.{layer}.self_attn.o_proj.weight"][target : target + CODE, head * SIZE : head * SIZE + CODE]
    columns += gain / normed * torch.eye(CODE)


def topic_model(folder: Path) -> LoadedModel:
    """A tiny random model whose tokens have topics, t modulo `N_TOPICS`: what attends to what is then a matter of topics."""
    make_tiny_model(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    file = folder / "model.safetensors"
    weights = load_file(file)
    embed = weights["model.embed_tokens.weight"]
    topics = torch.randn(N_TOPICS, embed.shape[1], generator=torch.Generator().manual_seed(1))
    weights["model.embed_tokens.weight"] = 0.1 * embed + topics[torch.arange(embed.shape[0]) % N_TOPICS]
    save_file(weights, file, metadata={"format": "pt"})
    return load_model(str(folder), device="cpu", dtype="fp32")


def topical_passages(n_tokens: int, seed: int) -> Iterator[list[int]]:
    """Passages for `topic_model`: runs of 64 to 256 tokens of one topic."""
    draw = random.Random(seed)
    while True:
        ids: list[int] = []
        while len(ids) < n_tokens:
            topic, length = draw.randrange(N_TOPICS), draw.randrange(64, 257)
            ids += [draw.randrange(0, 300 // N_TOPICS) * N_TOPICS + topic for _ in range(length)]
        yield ids[:n_tokens]
