"""Merging attention over disjoint sets of keys by log-sum-exp: exact, associative, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.errors import InvalidRequest


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine partial attention outputs over disjoint key sets into the output over their union.

        lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i

    Args:
        outs: [..., D] each, any float dtype, normalised over its own keys. Where its lse is -inf (no key) the content is
            ignored, whatever it is.
        lses: [...] each, float32, natural log; -inf = no key. Any finite size: the largest is subtracted first.

    Returns:
        out [..., D] float32 and lse [...] float32. Rows without a key anywhere: out 0, lse -inf.

    Raises:
        InvalidRequest: no partial at all, or not as many lses as outs.

    Source: online softmax (Milakov and Gimelshein 2018), section 3. Mutates nothing.
    """
    if not outs or len(outs) != len(lses):
        raise InvalidRequest(f"merge: expected as many lses as outs and at least one, got {len(outs)} outs and {len(lses)} lses")
    if len(outs) == 1:
        lse = lses[0].float()
        return torch.where((lse == -torch.inf).unsqueeze(-1), 0.0, outs[0].float()), lse
    top = lses[0].float()
    for other in lses[1:]:
        top = torch.maximum(top, other.float())
    top = torch.where(top == -torch.inf, 0.0, top)  # all partials empty: exp(-inf - 0) = 0 instead of exp(nan)
    total = torch.zeros_like(top)
    out: Tensor | None = None
    for part, lse in zip(outs, lses, strict=True):
        weight = torch.exp(lse.float() - top)
        total = total + weight
        # 0 * nan is nan, so an empty partial is replaced and not only weighted with 0
        term = torch.where((weight == 0).unsqueeze(-1), 0.0, part.float()) * weight.unsqueeze(-1)
        out = term if out is None else out.add_(term)
    assert out is not None
    out.div_(torch.where(total == 0, 1.0, total).unsqueeze(-1))
    return out, top + torch.log(total)
