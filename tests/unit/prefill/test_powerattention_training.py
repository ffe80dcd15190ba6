"""A small transformer trained with PowerAttention's mask finds passkeys that a window of equal budget cannot hand on so far."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.prefill.methods.powerattention import PowerAttention

pytestmark = pytest.mark.slow

BLOCK, LAYERS, WIDTH, KEYS, FILLERS = 16, 3, 48, 8, 4
LENGTHS = (384, 512, 768, 1024)
STAGES = {128: 110, 256: 40, 512: 16}  # steps at each length, the short first; 4096 tokens a step
MaskOf = Callable[[int], Tensor]


def power(n: int) -> Tensor:
    """[n, n] bool: own block and blocks at powers of two, nothing else."""
    method = PowerAttention(block=BLOCK, local_blocks=1, sink_blocks=0)
    plan = method.plan(torch.zeros(1, 1, n, 8), torch.zeros(1, 1, n, 8), LayerSpec(0, 1, 1, 8, 1.0))
    assert plan is not None
    return plan.to_dense_mask()[0, 0]


def most_blocks(n: int) -> int:
    return -(-int(power(n).sum(-1).max()) // BLOCK)


def dense(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def window(n: int) -> Tensor:
    """[n, n] bool: for every row as many of the last keys as the fullest row of `power` reads."""
    return dense(n).triu(1 - most_blocks(n) * BLOCK)


def far(n: int) -> list[int]:
    """Blocks between the last row and a key that LAYERS hops over powers of two cover and LAYERS windows do not."""
    return [blocks for blocks in range(LAYERS * most_blocks(n), n // BLOCK) if blocks.bit_count() <= LAYERS]


def near(n: int) -> list[int]:
    return list(range(1, LAYERS * (most_blocks(n) - 1)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        up, down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), up, nn.GELU(), down)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x))[:, None].chunk(3, -1)
        x = x + self.out(scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0])
        return x + self.mlp(x)


class Model(nn.Module):
    """One head a layer and no positions: only the mask tells rows apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(KEYS + FILLERS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, KEYS))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[batch, n] ids, [n, n] mask -> [batch, n, KEYS] logits: every row is asked for the key."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def prompts(n: int, places: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Fillers with one key at each of `places` -> [batch, n] ids, [batch] keys, all equally often."""
    ids = torch.randint(KEYS, KEYS + FILLERS, (places.numel(), n), generator=gen)
    keys = (torch.arange(places.numel()) + int(torch.randint(KEYS, (), generator=gen))) % KEYS
    return ids.scatter(1, places[:, None], keys[:, None]), keys


def trained(mask_of: MaskOf, seed: int = 0) -> Model:
    """Cross-entropy at every row that the key can reach through the mask."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=sum(STAGES.values()), pct_start=0.1)
    for n, steps in STAGES.items():
        mask = mask_of(n)
        reached = torch.linalg.matrix_power(mask.double(), LAYERS) > 0
        for _ in range(steps):
            places = torch.randint(n, (4096 // n,), generator=gen)
            ids, keys = prompts(n, places, gen)
            asked = reached.T[places]
            loss = cross_entropy(model(ids, mask)[asked], keys[:, None].expand_as(asked)[asked])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def accuracy(model: Model, mask_of: MaskOf, blocks_of: Callable[[int], list[int]]) -> dict[int, float]:
    """By length, the share of 32 prompts whose last row names the key that stands one of `blocks_of` blocks before it."""
    gen = torch.Generator().manual_seed(1)
    found = {}
    for n in LENGTHS:
        choice = torch.tensor(blocks_of(n))
        blocks = choice[torch.randint(choice.numel(), (32,), generator=gen)]
        places = n - BLOCK * (blocks + 1) + torch.randint(BLOCK, (32,), generator=gen)
        ids, keys = prompts(n, places, gen)
        found[n] = float((model(ids, mask_of(n))[:, -1].argmax(-1) == keys).double().mean())
    return found


def test_trained_with_the_mask_it_finds_passkeys_farther_than_a_window_of_equal_budget_reaches() -> None:
    assert all(int(window(n).sum()) > int(power(n).sum()) for n in LENGTHS)
    by_power, by_window = trained(power), trained(window)
    found = accuracy(by_power, power, far)
    assert min(found.values()) >= 0.95, found
    found = accuracy(by_window, window, near)  # it has learned the task
    assert min(found.values()) >= 0.6, found
    found = accuracy(by_window, window, far)
    assert max(found.values()) <= 0.35, found  # chance is 1 in 8


def test_trained_with_dense_attention_it_loses_far_passkeys_once_masked() -> None:
    model = trained(dense)
    found = accuracy(model, dense, far)
    assert min(found.values()) >= 0.95, found
    found = accuracy(model, power, far)
    assert max(found.values()) <= 0.7, found
