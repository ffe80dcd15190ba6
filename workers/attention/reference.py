"""A plan's attention written out pair by pair, with autograd: what the executors are tested against and gates are trained with.

For small sizes: all N M logits of every head are held at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.attention.estimates import log_weights
from winnow.workers.attention.plan import TilePlan


def attend_reference(
    plan: TilePlan | None, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0, window: int = 0
) -> tuple[Tensor, Tensor]:
    """What `attend_plan` computes, in torch operations that can be differentiated.

        l_ij  = scale q_i . k_j, soft-capped, over the pairs that the plan keeps and its pseudo-keys
        lse_i = log sum_j exp(l_ij)
        o_i   = sum_j exp(l_ij - lse_i) v_j

    and a residual joins as one more key of logit lse with value out.

    Args:
        plan: any valid plan, None = dense. Gradients flow through q, k, v and a residual, not through what the plan keeps.
        q: [B, Hq, N, D]; k, v: [B, Hkv, M, D]; any float dtype, any device. The rest as `attend_plan`.

    Returns:
        out [B, Hq, N, D] and lse [B, Hq, N]: float64 if q is, else float32. A row that a window leaves no key: 0 and -inf.

    Source: scaled dot-product attention (Vaswani et al. 2017, section 3.2.1). Mutates nothing. Checks nothing.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    n, m, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    rows, keys, values = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    position, key = torch.arange(m - n, m, device=q.device)[:, None], torch.arange(m, device=q.device)
    keep = (key <= position) & (key > position - (window or m))
    if plan is not None:
        keep = keep & plan.to_dense_mask().repeat_interleave(q.shape[1] // plan.mask_heads, 1)
    logits = _logits(rows, keys, scale, softcap).masked_fill(~keep, -torch.inf)
    if plan is not None and plan.mean_correction:
        bk = plan.block_k
        pooled_k, pooled_v = (x[:, :, : m // bk * bk].unflatten(2, (-1, bk)).mean(3) for x in (keys, values))
        weight = log_weights(plan, window).repeat_interleave(q.shape[1] // plan.mask_heads, 1)[..., : m // bk]
        weight = weight.repeat_interleave(plan.block_q, 2)[:, :, :n].to(dtype)
        logits = torch.cat((logits, _logits(rows, pooled_k, scale, softcap) + weight), -1)
        values = torch.cat((values, pooled_v), 2)
    lse = torch.logsumexp(logits, -1)
    out = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)) @ values
    if plan is None or plan.residual is None:
        return out, lse
    other, other_lse = plan.residual if isinstance(plan.residual, tuple) else plan.residual(q, k, v, scale=scale, softcap=softcap)
    other = torch.where((other_lse == -torch.inf).unsqueeze(-1), 0.0, other.to(dtype))
    total = torch.logaddexp(lse, other_lse.to(dtype))
    share = torch.exp(lse - total).unsqueeze(-1)
    return share * out + (1 - share) * other, total


def _logits(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    logits = q @ k.transpose(-1, -2) * scale
    return torch.tanh(logits / softcap) * softcap if softcap else logits
