"""The network that draws SEA's compressed attention map: linear attention, a small decoder, causal convolutions. Differentiable.

All of a row's output depends on the queries and keys up to its own position only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-3  # added to the random features: a row whose features are all zero would divide zero by zero
_SCAN = 128  # tokens of a chunk of the causal prefix sums
_REACH = 4  # tokens a convolution looks back: kernel 3, dilation 2
CHANNELS = 2  # a head has in the convolutions
UPSAMPLE = 4  # from the columns of the convolutions to those of the map


@dataclass(frozen=True)
class Sizes:
    """Hq, D, longest sequence in tokens, random features, columns of the map (T_M, a multiple of 4), and rows of the position
    table: positions between two rows get a mix of both, so that the table does not grow with the length."""

    heads: int
    head_size: int
    positions: int
    features: int
    columns: int
    knots: int = 128

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters of one layer by name."""
        d, narrow, maps = self.head_size, self.columns // UPSAMPLE, CHANNELS * self.heads
        return {
            "features": (self.features, d),
            "positions": (self.knots, d),
            "encode_w": (2 * d, 3 * d),
            "encode_b": (2 * d,),
            "encode_norm": (2, 2 * d),
            "row_w": (CHANNELS * narrow, 2 * d),
            "row_b": (CHANNELS * narrow,),
            "row_norm": (2, narrow),
            "conv1_w": (maps, maps, 3, 3),
            "conv1_b": (maps,),
            "conv2_w": (maps, maps, 3, 3),
            "conv2_b": (maps,),
            "mix_w": (self.heads, maps),
            "mix_b": (self.heads,),
            "map_norm": (2, self.columns),
            "gate_w": (2, 2 * d),
            "gate_b": (2,),
        }

    def initial(self, seed: int) -> dict[str, Tensor]:
        """Seeded parameters of an untrained layer, float32 on the CPU."""
        gen = torch.Generator().manual_seed(seed)
        found: dict[str, Tensor] = {}
        for name, shape in self.shapes().items():
            if name.endswith("_norm"):
                found[name] = torch.stack((torch.ones(shape[1]), torch.zeros(shape[1])))
            elif name.endswith("_b"):
                found[name] = torch.zeros(shape)
            else:
                found[name] = torch.randn(shape, generator=gen) / math.sqrt(math.prod(shape[1:]))
        found["features"] = _orthogonal(self.features, self.head_size, gen)
        identity = torch.eye(self.head_size)[None]  # a position is first told by the neighbouring two of D marks
        found["positions"] = F.interpolate(identity, self.knots, mode="linear")[0].T.contiguous()
        found["gate_b"] = torch.tensor([4.0, 2.0])  # begin near the sparse attention alone
        return found


@dataclass(frozen=True, eq=False)
class Carry:
    """What a run over further rows of the same sequence needs of those before: sums of the linear attention
    [B, Hkv, F, 2 D + 1], and the last rows that went into each convolution [B, 2 Hq, 4, columns / 4]."""

    sums: Tensor
    first: Tensor
    second: Tensor


def draw_map(
    p: Mapping[str, Tensor], q: Tensor, k: Tensor, first: int, scale: float, longest: int, carry: Carry | None = None
) -> tuple[Tensor, Tensor, Carry]:
    """Estimate where each query looks.

    Args:
        p: parameters of one layer, see `Sizes.shapes`, float32 on q's device.
        q: [B, Hq, N, D]. k: [B, Hkv, N, D], of the same N tokens. Both post-RoPE, any float dtype.
        first: position of the first of them. scale: the layer's factor on q.k. longest: `Sizes.positions`.
        carry: of the rows before; None = there are none, or nothing is known of them.

    Returns:
        log_map [B, Hq, N, columns] float32, logarithms of probabilities: column c of the row at position p stands for the keys
        [c, c + 1) (p + 1) / columns; gates [B, Hq, N, 2] float32 before their sigmoid; and the carry for what follows.
    """
    attended, sums = _linear_attention(p, q.float(), k.float(), first, scale, longest, carry.sums if carry is not None else None)
    own = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    encoded = F.linear(torch.cat((attended, own), -1), p["encode_w"], p["encode_b"])
    encoded = F.gelu(F.layer_norm(encoded, encoded.shape[-1:], p["encode_norm"][0], p["encode_norm"][1]))
    rows = F.linear(encoded, p["row_w"], p["row_b"]).unflatten(-1, (CHANNELS, -1)).transpose(2, 3)  # [B, Hq, 2, N, narrow]
    rows = F.layer_norm(rows, rows.shape[-1:], p["row_norm"][0], p["row_norm"][1]).flatten(1, 2)
    nothing = torch.zeros_like(rows[:, :, :1]).expand(-1, -1, _REACH, -1)
    once, first_tail = _convolve(rows, p["conv1_w"], p["conv1_b"], nothing if carry is None else carry.first)
    twice, second_tail = _convolve(once, p["conv2_w"], p["conv2_b"], nothing if carry is None else carry.second)
    drawn = torch.einsum("bcnw,hc->bhnw", twice, p["mix_w"]) + p["mix_b"][:, None, None]
    drawn = drawn.repeat_interleave(UPSAMPLE, -1)
    log_map = F.layer_norm(drawn, drawn.shape[-1:], p["map_norm"][0], p["map_norm"][1]).log_softmax(-1)
    gates = F.linear(encoded.detach(), p["gate_w"], p["gate_b"])  # what the map is drawn from is the map's to learn
    return log_map, gates, Carry(sums, first_tail, second_tail)


def key_sums(p: Mapping[str, Tensor], k: Tensor, scale: float, longest: int) -> Tensor:
    """The sums of `Carry` over the keys k [B, Hkv, M, D] of positions 0 .. M - 1: all that can be known of rows whose queries
    are gone. p, scale, longest: as `draw_map`."""
    phi = _phi(k.float(), p["features"], scale)
    return torch.einsum("bhnf,bhnd->bhfd", phi, _values(p, k.float(), 0, longest))


def _linear_attention(
    p: Mapping[str, Tensor], q: Tensor, k: Tensor, first: int, scale: float, longest: int, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Causal attention with the kernel phi(q) . phi(k): [B, Hq, N, 2 D] over position marks and keys; and the sums after."""
    batch, hq, n, _ = q.shape
    hkv, pad = k.shape[1], -q.shape[2] % _SCAN
    phi_q = F.pad(_phi(q, p["features"], scale), (0, 0, 0, pad)).unflatten(2, (-1, _SCAN)).unflatten(1, (hkv, -1))
    phi_k = F.pad(_phi(k, p["features"], scale), (0, 0, 0, pad)).unflatten(2, (-1, _SCAN))
    values = F.pad(_values(p, k, first, longest), (0, 0, 0, pad)).unflatten(2, (-1, _SCAN))
    chunks = torch.einsum("bhcnf,bhcnd->bhcfd", phi_k, values)
    start = chunks.new_zeros(batch, hkv, 1, *chunks.shape[3:]) if before is None else before.unsqueeze(2)
    sums = torch.cat((start, chunks), 2).cumsum(2)  # [B, Hkv, chunks + 1, F, 2 D + 1]
    near = torch.einsum("bhgcnf,bhcmf->bhgcnm", phi_q, phi_k).tril()
    total = torch.einsum("bhgcnm,bhcmd->bhgcnd", near, values)
    total = total + torch.einsum("bhgcnf,bhcfd->bhgcnd", phi_q, sums[:, :, :-1])
    total = total.flatten(3, 4)[:, :, :, :n].reshape(batch, hq, n, -1)
    return total[..., :-1] / total[..., -1:], sums[:, :, -1]


def _phi(x: Tensor, features: Tensor, scale: float) -> Tensor:
    return F.relu(F.linear(x * math.sqrt(scale), features)) + _EPS


def _values(p: Mapping[str, Tensor], k: Tensor, first: int, longest: int) -> Tensor:
    """[B, Hkv, N, 2 D + 1]: position marks, keys, and ones, which count the kernel's mass."""
    marks = F.interpolate(p["positions"].T[None], longest, mode="linear")[0].T[first : first + k.shape[2]]
    marks = marks.expand(*k.shape[:2], -1, -1)
    return torch.cat((marks, k, torch.ones_like(k[..., :1])), -1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """3 x 3 over tokens (dilation 2, this one and earlier ones) and columns, then ReLU; and the last rows that went in."""
    longer = torch.cat((before, x), 2)
    return F.relu(F.conv2d(longer, weight, bias, padding=(0, 1), dilation=(2, 1))), longer[:, :, -_REACH:]


def _orthogonal(features: int, size: int, gen: torch.Generator) -> Tensor:
    """Random directions of random length, orthogonal to each other in groups of `size`."""
    groups = [torch.linalg.qr(torch.randn(size, size, generator=gen))[0] for _ in range(-(-features // size))]
    lengths = torch.randn(features, size, generator=gen).norm(dim=-1, keepdim=True)
    directions: Tensor = torch.cat(groups)[:features] * lengths
    return directions
