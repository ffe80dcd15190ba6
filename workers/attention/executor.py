"""The executor: runs any `TilePlan` on any device and returns output and log-sum-exp. Methods decide, this computes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention import blocks, sparse
from winnow.workers.attention.dense import dense, masked
from winnow.workers.attention.estimates import estimates
from winnow.workers.attention.lse import merge
from winnow.workers.attention.plan import HeadClass, TilePlan

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_SPLIT_KEYS = 1024  # shorter pieces cost more in merging than they save


def attend_plan(
    plan: TilePlan | None, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0, window: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention of N rows over the keys a plan keeps, right-aligned causal, and its estimates of those it does not.

    Args:
        plan: None = dense. Its mask heads may be the query heads, the KV heads or 1; its batch that of q, or 1.
        q: [B, Hq, N, D], float32, float16 or bfloat16.
        k, v: [B, Hkv, M, D], same dtype and device, M >= N; any outer strides. An innermost stride other than 1 costs a copy.
        scale: factor on q.k before the softmax.
        softcap: logits become softcap * tanh(logits / softcap); 0 = none.
        window: a row at position p reads keys > p - window only, whatever the plan keeps; 0 = no limit.

    Returns:
        out [B, Hq, N, D] in q's dtype, and lse [B, Hq, N] float32, natural log, over the keys read and estimated.

    Raises:
        InvalidRequest: shapes that do not fit each other or the plan.
        Unsupported: a dtype that cannot be run; the message names it.

    Mutates nothing. Works in float32 inside and rounds once per partial result.
    """
    blocks.check_inputs(q, k, v)
    if window < 0 or not softcap >= 0.0:
        raise InvalidRequest(f"attention: window and softcap must be 0 (none) or more, got {window} and {softcap}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the fused kernels take it for granted
    window = 0 if window >= k.shape[2] else window
    if plan is None:
        return _dense(q, k, v, scale, softcap, window)
    check_plan(plan, q, k.shape[2], k.shape[1])
    rest = replace(plan, mean_correction=False)
    fused = window == 0 and softcap == 0.0  # then the mean correction is computed along with what is read
    if plan.kinds == {HeadClass.DENSE}:
        out, lse = _dense(q, k, v, scale, softcap, window)
    elif window == 0 and q.device.type == "cpu":
        out, lse = sparse.attend(plan if fused else rest, q, k, v, scale=scale, softcap=softcap)
    elif _fits_rows(plan, q):
        from winnow.workers.attention.kernels.row_attention import row_attention

        out, lse = row_attention(plan, q, k, v, scale=scale, softcap=softcap, window=window)
    elif fused and fits_kernel(plan, q):
        from winnow.workers.attention.kernels.tile_attention.kernel import tile_attention  # triton: absent on most CPU machines

        out, lse = tile_attention(plan, q, k, v, scale=scale)
    else:
        fused = False
        out, lse = _masked(plan, q, k, v, scale, softcap, window)
    left = rest if fused else plan
    if not left.is_estimating:
        return out, lse
    outs, lses = zip(*estimates(left, q, k, v, scale=scale, softcap=softcap, window=window), strict=True)
    merged, lse = merge((out, *outs), (lse, *lses))
    return merged.to(q.dtype), lse


def _fits_rows(plan: TilePlan, q: Tensor) -> bool:
    if q.device.type != "cuda" or plan.block_q != 1:
        return False
    from winnow.workers.attention.kernels.row_attention import fits

    return fits(plan, q)


def fits_kernel(plan: TilePlan, q: Tensor) -> bool:
    """Whether the Triton kernel can run these tiles and heads, on CUDA."""
    if q.device.type != "cuda":
        return False
    from winnow.workers.attention.kernels.tile_attention.kernel import why_not

    return not why_not(q.shape[3], plan.block_q, plan.block_k)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: int) -> tuple[Tensor, Tensor]:
    if not window or softcap or q.device.type != "cuda":
        return dense(q, k, v, scale=scale, softcap=softcap, window=window)
    plan = TilePlan.streaming(  # a window is a streaming head without a sink
        batch=1, mask_heads=1, n_rows=q.shape[2], n_keys=k.shape[2], sink=0, recent=window, block_k=64, device=q.device
    )
    return attend_plan(plan, q, k, v, scale=scale)


def attend_keys(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """One query token over all keys given: the decode step.

    Args:
        q: [Hq, D]. k, v: [Hkv, m, D], same dtype and device, innermost stride 1; views of a longer cache are read in place.
            m = 0 is allowed. Not checked: this is called for every layer of every token.

    Returns:
        out [Hq, D] float32 and lse [Hq] float32; with m = 0, out 0 and lse -inf.

    Cost: reads k and v once; the query heads of a group are rows of one small matrix product.
    """
    hq, d = q.shape
    hkv, m = k.shape[0], k.shape[1]
    if m == 0:
        return torch.zeros(hq, d, device=q.device), torch.full((hq,), -torch.inf, device=q.device)
    if q.device.type != "cpu" or softcap:
        rows = q.reshape(1, hkv, hq // hkv, d)
        out, lse = blocks.block(rows, k.unsqueeze(0), v.unsqueeze(0), scale=scale, softcap=softcap)
        return out.reshape(hq, d).float(), lse.reshape(hq)
    rows = q.reshape(hkv, 1, hq // hkv, d)  # heads as batch: the kernel's output is then laid out as ours
    splits = _splits(hkv, m)
    if splits == 1:
        out, lse = _flash_cpu(rows, k.unsqueeze(1), v.unsqueeze(1), 0.0, False, scale=scale)
        return out.view(hq, d).float(), lse.view(hq)
    # Too few heads to keep all cores busy: the keys of a head are cut into equal pieces, which the kernel sees as heads.
    size = m // splits
    pieces_k, pieces_v = (x[:, : splits * size].unflatten(1, (splits, size)) for x in (k, v))
    out, lse = _flash_cpu(rows.expand(-1, splits, -1, -1), pieces_k, pieces_v, 0.0, False, scale=scale)
    outs, lses = list(out.unbind(1)), list(lse.unbind(1))
    if splits * size < m:
        rest_k, rest_v = (x[:, splits * size :].unsqueeze(1) for x in (k, v))
        rest, rest_lse = _flash_cpu(rows, rest_k, rest_v, 0.0, False, scale=scale)
        outs.append(rest[:, 0])
        lses.append(rest_lse[:, 0])
    out, lse = merge(outs, lses)
    return out.reshape(hq, d), lse.reshape(hq)


def _splits(hkv: int, m: int) -> int:
    """Pieces per head that give each of torch's threads work where hkv heads cannot; none shorter than _SPLIT_KEYS."""
    return max(1, min(-(-torch.get_num_threads() // hkv), m // _SPLIT_KEYS))


def check_plan(plan: TilePlan, q: Tensor, n_keys: int, kv_heads: int) -> None:
    """Raise InvalidRequest unless the plan was made for q [B, Hq, N, D] and this many keys, on q's device; on a CPU also if no
    constructor of `TilePlan` made it and an invariant does not hold. An accelerator does not wait to be asked."""
    if (plan.n_rows, plan.n_keys) != (q.shape[2], n_keys):
        raise InvalidRequest(f"plan: made for {plan.n_rows} rows and {plan.n_keys} keys, got {q.shape[2]} and {n_keys}")
    if plan.mask_heads not in (1, kv_heads, q.shape[1]) or plan.batch not in (1, q.shape[0]):
        raise InvalidRequest(
            f"plan: has {plan.batch} sequences and {plan.mask_heads} mask heads; needs {q.shape[0]} (or 1) and "
            f"{q.shape[1]} query heads, {kv_heads} KV heads or 1"
        )
    if plan.device != q.device:
        raise InvalidRequest(f"plan: lies on {plan.device}, q on {q.device}; move one of them")
    if not plan.is_made and plan.device.type == "cpu":
        plan.check()
    if isinstance(plan.residual, tuple) and (plan.residual[0].shape, plan.residual[1].shape) != (q.shape, q.shape[:3]):
        got = f"{list(plan.residual[0].shape)} and {list(plan.residual[1].shape)}"
        raise InvalidRequest(f"plan: residual needs an output of {list(q.shape)} and an lse of {list(q.shape[:3])}, got {got}")


def _masked(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: int) -> tuple[Tensor, Tensor]:
    """What no faster path says: a window beside a plan, and on CUDA soft-capping and odd tiles. Float32 over all pairs."""
    shared = q.shape[1] // plan.mask_heads

    def keep(start: int, stop: int) -> Tensor:
        mask = plan.to_dense_mask(start, stop)
        return mask if plan.mask_heads == 1 else mask.repeat_interleave(shared, 1)

    return masked(q, k, v, scale=scale, softcap=softcap, window=window, keep=keep)
