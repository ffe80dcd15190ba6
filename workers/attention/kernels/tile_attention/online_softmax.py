"""The inner step of `tile_attention_kernel`. Importing this module imports triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pages(table, key, first, n_keys, PAGE: tl.constexpr, STEP: tl.constexpr):
    """Pages of the keys [STEP] that begin with `first`, a multiple of STEP: one for all where they share it.

    Reads no entry of the table past the one of the last key.
    """
    if PAGE == 0:
        return 0
    elif PAGE >= STEP:
        return tl.load(table + first // PAGE, mask=first < n_keys, other=0).to(tl.int64)
    else:
        return tl.load(table + key // PAGE, mask=key < n_keys, other=0).to(tl.int64)


@triton.jit
def step(
    acc, top, total, q, k_base, v_base, key, page, loaded, allowed, bias, d_idx, stride_kp, stride_kn, stride_vp, stride_vn,
    scale_log2, HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, LOADED: tl.constexpr, ALLOWED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Online softmax (Milakov and Gimelshein 2018) over the keys [STEP]; rows without a key so far keep top = -inf.

    With LOADED only keys set in loaded [STEP] exist; with ALLOWED only pairs set in allowed are read; with BIASED bias is added.
    With PAGE key j of the sequence is key j mod PAGE of its page.
    """
    inside = (d_idx < HEAD_SIZE)[None, :]
    if LOADED:
        inside = inside & loaded[:, None]
    if PAGE:
        k_base += page * stride_kp + (key % PAGE) * stride_kn
        v_base += page * stride_vp + (key % PAGE) * stride_vn
        k = tl.load(k_base[:, None] + d_idx[None, :], mask=inside, other=0.0).to(q.dtype)
        v = tl.load(v_base[:, None] + d_idx[None, :], mask=inside, other=0.0).to(q.dtype)
    else:
        k = tl.load(k_base + key[:, None] * stride_kn + d_idx[None, :], mask=inside, other=0.0).to(q.dtype)
        v = tl.load(v_base + key[:, None] * stride_vn + d_idx[None, :], mask=inside, other=0.0).to(q.dtype)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if BIASED:
        logits = logits + bias
    if ALLOWED:
        logits = tl.where(allowed, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf is nan
    weights = tl.math.exp2(logits - shift[:, None])
    decay = tl.math.exp2(top - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc, new_top, total
