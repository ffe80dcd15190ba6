"""Keys and values in pages, in float8 and in packs, against attention written out pair by pair in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from attention_cases import SCALE, random_plan
from stored_cases import PLANS, STORAGES, Geometry, assert_near, normal, pack_of, store, truth
from torch import Tensor

from winnow.errors import InvalidRequest, Unsupported
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.kernels.tile_attention import pseudo_keys
from winnow.workers.attention.kv import FP8, KVStorage, quantize_kv
from winnow.workers.attention.plan import TilePlan
from winnow.workers.attention.stored import attend_pack, attend_stored

BATCHES = [(2, 4, 2, 33, 90, 16, 8), (1, 4, 4, 65, 65, 8, 32), (1, 6, 3, 1, 50, 16, 16)]
PACK = [  # Hq, Hkv = 4, 2: N, M, tiles, plan, its mask heads; None = no plan
    (33, 90, (16, 16), "tiles", 4),
    (1, 17, (16, 16), "mixed", 2),
    (50, 50, (16, 16), None, 1),
    (40, 131, (8, 32), "mean", 2),
    (20, 64, (16, 16), "intervals", 1),
    (64, 70, (16, 16), "streaming", 4),
    (31, 45, (12, 7), "columns", 4),
]


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


@pytest.mark.parametrize("geometry", BATCHES, ids=str)
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("how", STORAGES)
def test_storage_changes_nothing(geometry: Geometry, kind: str, how: str) -> None:
    b, hq, hkv, n, m = geometry[:5]
    q = normal(b, n, hq, 16, seed=n).transpose(1, 2)
    for heads, page in ((hq, 16), (hkv, 64)):
        plan = PLANS[kind](geometry, heads)
        kv, k, v = store(how, normal(b, hkv, m, 16, seed=m), normal(b, hkv, m, 16, seed=m + 1), page=page)
        assert_near(attend_stored(plan, q, kv, scale=SCALE), truth(plan, q, k, v, SCALE), 1e-5)


@pytest.mark.parametrize("how", STORAGES)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 0), (0.0, 7), (5.0, 500)])
def test_softcap_window_and_no_plan(how: str, softcap: float, window: int) -> None:
    geometry = BATCHES[0]
    b, hq, hkv, n, m = geometry[:5]
    q, limits = normal(b, hq, n, 16, seed=n), {"softcap": softcap, "window": window}
    kv, k, v = store(how, normal(b, hkv, m, 16, seed=m), normal(b, hkv, m, 16, seed=m + 1))
    for plan in (None, PLANS["mixed"](geometry, hq)):
        known = dataclasses.replace(kv, n_keys=m)
        got = attend_stored(plan, q, known, scale=SCALE, softcap=softcap, window=window)
        assert_near(got, truth(plan, q, k, v, SCALE, **limits), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", STORAGES)
def test_half_precision(dtype: torch.dtype, how: str) -> None:
    geometry = (1, 4, 2, 100, 150, 16, 16)
    q = normal(1, 4, 100, 16, seed=0, dtype=dtype)
    kv, k, v = store(how, normal(1, 2, 150, 16, seed=1, dtype=dtype), normal(1, 2, 150, 16, seed=2, dtype=dtype))
    for kind in ("tiles", "mean"):
        plan = PLANS[kind](geometry, 4)
        out, lse = attend_stored(plan, q, kv, scale=SCALE)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert_near((out, lse), truth(plan, q, k, v, SCALE), 2e-2)


def make_pack(
    how: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, KVStorage, list[TilePlan | None], list[int], list[int]]:
    """q, storage, plans and cumulative lengths of PACK."""
    q, stored, plans = [], [], []
    for i, (n, m, (bq, bk), kind, heads) in enumerate(PACK):
        q.append(normal(n, 4, 16, seed=i, dtype=dtype))
        stored.append(store(how, *(normal(1, 2, m, 16, seed=100 * x + i, dtype=dtype) for x in (1, 2)))[0])
        plans.append(None if kind is None else PLANS[kind]((1, 4, 2, n, m, bq, bk), heads))
    rows, keys = ([0, *itertools.accumulate(case[axis] for case in PACK)] for axis in (0, 1))  # type: ignore[misc]
    return torch.cat(q), pack_of(stored), plans, rows, keys


def expected_of_pack(how: str, q: Tensor, plans: list[TilePlan | None], **limits: float) -> tuple[Tensor, Tensor]:
    outs, lses, before = [], [], 0
    for i, (n, m, _, _, _) in enumerate(PACK):
        _, k, v = store(how, *(normal(1, 2, m, 16, seed=100 * x + i, dtype=q.dtype) for x in (1, 2)))
        out, lse = truth(plans[i], q[before : before + n].transpose(0, 1)[None], k, v, SCALE, **limits)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
        before += n
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("how", STORAGES)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 0), (0.0, 7)])
def test_a_pack_is_its_sequences(how: str, softcap: float, window: int) -> None:
    q, kv, plans, rows, keys = make_pack(how)
    got = attend_pack(plans, q, kv, rows, torch.tensor(keys, dtype=torch.int32), scale=SCALE, softcap=softcap, window=window)
    assert got[0].shape == q.shape and got[1].shape == (4, len(q))
    assert_near(got, expected_of_pack(how, q, plans, softcap=softcap, window=window), 1e-5)


def test_sequences_of_a_pack_do_not_see_each_other() -> None:
    q, kv, plans, rows, keys = make_pack("contiguous")
    whole, _ = attend_pack(plans, q, kv, rows, keys, scale=SCALE)
    for i in range(len(PACK)):
        k, v = (torch.full_like(x, torch.nan) for x in (kv.k, kv.v))
        here = slice(keys[i], keys[i + 1])
        k[here], v[here] = kv.k[here], kv.v[here]
        alone, _ = attend_pack(plans, q, KVStorage(k, v), rows, keys, scale=SCALE)
        own = slice(rows[i], rows[i + 1])
        assert torch.equal(alone[own], whole[own]) and not bool(alone[: rows[i]].isfinite().any())


@pytest.mark.parametrize("estimator", [False, True])
def test_residuals_join_whatever_the_storage(estimator: bool) -> None:
    geometry = (1, 4, 2, 40, 77, 16, 16)
    fixed = normal(1, 4, 40, 16, seed=7), normal(1, 4, 40, seed=8)

    def estimate(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        assert k.shape == (1, 2, 77, 16)
        found = v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(q.shape)
        return found.float(), (q.float().sum(-1) + k.float().mean()) * scale

    plan = dataclasses.replace(PLANS["mean"](geometry, 4), residual=estimate if estimator else fixed)
    q = normal(1, 4, 40, 16, seed=0)
    for how in STORAGES:
        kv, k, v = store(how, normal(1, 2, 77, 16, seed=1), normal(1, 2, 77, 16, seed=2))
        expected = truth(plan, q, k, v, SCALE)
        assert_near(attend_stored(plan, q, kv, scale=SCALE), expected, 1e-5)
        out, lse = attend_pack([plan], q[0].transpose(0, 1), pack_of([kv]), [0, 40], [0, 77], scale=SCALE)
        assert_near((out.transpose(0, 1)[None], lse[None]), expected, 1e-5)


def test_a_wrong_page_order_or_scale_or_an_extra_key_shows() -> None:
    """What the tests above compare would differ by far more than they allow. (Pages that all rows read could be swapped.)"""
    geometry = (1, 4, 2, 40, 90, 16, 16)
    plan, q = PLANS["dense"](geometry, 4), normal(1, 4, 40, 16, seed=0)
    kv, k, v = store("paged-fp8", normal(1, 2, 90, 16, seed=1), normal(1, 2, 90, 16, seed=2))
    expected = truth(plan, q, k, v, SCALE)[0]
    assert kv.page_table is not None and kv.k_scale is not None and kv.v_scale is not None
    swapped = kv.page_table.clone()
    swapped[:, 4], swapped[:, 5] = kv.page_table[:, 5], kv.page_table[:, 4]  # the last page is cut short
    changes = {
        "order": {"page_table": kv.page_table[:, [0, 1, 2, 4, 3, 5]]},
        "k_scale": {"k_scale": kv.k_scale * torch.tensor([1.0, 1.1])},
        "v_scale": {"v_scale": kv.v_scale.flip(1)},
        "no scale": {"k_scale": None},
    }
    for name, change in changes.items():
        out, _ = attend_stored(plan, q, dataclasses.replace(kv, **change), scale=SCALE)  # type: ignore[arg-type]
        assert float((out - expected).norm() / expected.norm()) > 1e-2, name
    for wrong in (dataclasses.replace(kv, page_table=swapped), dataclasses.replace(kv, n_keys=91)):
        longer = TilePlan.dense(batch=1, mask_heads=1, n_rows=40, n_keys=wrong.n_keys or 90)
        assert bool(attend_stored(longer, q, wrong, scale=SCALE)[0].isnan().any())


@pytest.mark.parametrize("m", [7, 90, 300])
@pytest.mark.parametrize("page", [16, 128])
def test_means_of_tiles_are_taken_out_of_pages_piece_by_piece(m: int, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudo_keys, "_KEYS", 70)
    plan = random_plan((2, 4, 2, 5, m, 16, 8), 4, 0.3, columns=0.1, mean_correction=True)
    k, v = normal(2, 2, m, 16, seed=1), normal(2, 2, m, 16, seed=2)
    for got, expected in zip(
        pseudo_keys.stored_pseudo_keys(plan, store("paged", k, v, page=page)[0], torch.float32),
        pseudo_keys.pseudo_keys(plan, k, v),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
        assert got.is_contiguous()


def test_sequences_share_pages() -> None:
    k, v = (normal(1, 2, 96, 16, seed=i) for i in (1, 2))
    kv, _, _ = store("paged", k, v, page=32)
    assert kv.page_table is not None
    both = dataclasses.replace(kv, page_table=torch.cat((kv.page_table, kv.page_table)))
    q = normal(50, 4, 16, seed=0)
    plans = [random_plan((1, 4, 2, 20, 96, 16, 16), 4, 0.5), random_plan((1, 4, 2, 30, 70, 16, 16), 4, 0.5)]
    out, _ = attend_pack(plans, q, both, [0, 20, 50], [0, 96, 166], scale=SCALE)
    for plan, here, m in zip(plans, (slice(0, 20), slice(20, 50)), (96, 70), strict=True):
        own, _ = attend_plan(plan, q[here].transpose(0, 1)[None], k[:, :, :m], v[:, :, :m], scale=SCALE)
        torch.testing.assert_close(out[here], own[0].transpose(0, 1), atol=1e-6, rtol=1e-6)


def test_quantized_values_are_as_near_as_promised() -> None:
    k, v = normal(2, 3, 200, 16, seed=1) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None], normal(2, 3, 200, 16, seed=2)
    k[0, 1] = 0.0
    kv = quantize_kv(k, v)
    assert kv.k.dtype == FP8 and kv.k_scale is not None and kv.k_scale.shape == (2, 3) and float(kv.k_scale[0, 1]) == 1.0
    for x, back, scale in zip((k, v), kv.to_contiguous(torch.float32), (kv.k_scale, kv.v_scale), strict=True):
        assert scale is not None
        allowed = torch.maximum(x.abs() / 16, scale[..., None, None] / 1024) * 1.0001
        assert bool(((x - back).abs() <= allowed).all())
        assert float((x - back).norm() / x.norm()) < 0.04
    given = quantize_kv(k, v, k_scale=torch.full((1, 3), 1e-4), v_scale=torch.full((1, 3), 1.0))
    assert float(given.to_contiguous(torch.float32)[0].abs().max()) <= 448e-4 * 1.0001  # cut, not infinite
    together = quantize_kv(k[0].transpose(0, 1), v[0].transpose(0, 1))
    torch.testing.assert_close(together.k_scale, kv.k_scale[:1], atol=0, rtol=0)
    assert torch.equal(together.k.float(), kv.k[0].transpose(0, 1).float())


def test_what_float8_costs_on_random_keys() -> None:
    """The output's error is that of the values, not amplified; keys and values as far as normal ones are."""
    geometry = (1, 4, 2, 100, 300, 16, 16)
    q, k, v = normal(1, 4, 100, 64, seed=0), normal(1, 2, 300, 64, seed=1), normal(1, 2, 300, 64, seed=2)
    plan = PLANS["tiles"](geometry, 4)
    exact, exact_lse = truth(plan, q, k.double(), v.double(), 0.125)
    out, lse = attend_stored(plan, q, quantize_kv(k, v), scale=0.125)
    assert 1e-3 < float((out - exact).norm() / exact.norm()) < 0.05
    assert float((lse - exact_lse).abs().max()) < 0.1


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = normal(1, 4, 32, 16, seed=0), normal(1, 2, 40, 16, seed=1), normal(1, 2, 40, 16, seed=2)
    kv, _, _ = store("paged", k, v)
    plan = TilePlan.dense(batch=1, mask_heads=1, n_rows=32, n_keys=40)
    table = kv.page_table
    assert table is not None
    for wrong, error, match in (
        ({"k": kv.k.double(), "v": kv.v.double()}, Unsupported, "float64"),
        ({"k": kv.k[:, :, :8], "v": kv.v[:, :, :8]}, Unsupported, "power of two"),
        ({"v": kv.v[:-1]}, InvalidRequest, "alike"),
        ({"page_table": table.long()}, InvalidRequest, "int32"),
        ({"k_scale": torch.ones(1, 2)}, InvalidRequest, "leave it out"),
        ({"k": kv.k.to(FP8), "v": kv.v.to(FP8), "v_scale": torch.ones(2)}, InvalidRequest, "v_scale must be"),
        ({"k": kv.k[..., ::2], "v": kv.v[..., ::2]}, InvalidRequest, "innermost"),
    ):
        with pytest.raises(error, match=match):
            dataclasses.replace(kv, **wrong)  # type: ignore[arg-type]
    for stored, match in (
        (dataclasses.replace(kv, page_table=table[:, :2]), "pages for 40 keys"),
        (dataclasses.replace(kv, page_table=table[:, [0, 1, 4]]), "names pages"),
        (dataclasses.replace(kv, page_table=-table), "names pages"),
        (dataclasses.replace(kv, page_table=table.repeat(2, 1)), "a row for each of 1"),
        (dataclasses.replace(kv, n_keys=30), "rows <= keys"),
        (dataclasses.replace(kv, n_keys=41), "41"),
        (KVStorage(k[:, :, :31], v[:, :, :31]), "rows <= keys"),
        (KVStorage(k[0], v[0]), "attend_pack"),
        (KVStorage(k.to(FP8), v.to(FP8), k_scale=torch.ones(3, 2)), "3 rows"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            attend_stored(plan, q, stored, scale=SCALE)
    with pytest.raises(InvalidRequest, match="n_keys is missing"):
        attend_stored(None, q, kv, scale=SCALE)
    with pytest.raises(Unsupported, match="bfloat16"):
        attend_stored(plan, q.bfloat16(), kv, scale=SCALE)
    with pytest.raises(InvalidRequest, match="multiple"):
        attend_stored(plan, q[:, :3], kv, scale=SCALE)


def test_a_pack_that_does_not_fit_is_refused() -> None:
    q, kv, plans, rows, keys = make_pack("contiguous")

    def refused(match: str, **change: object) -> None:
        given = {"plans": plans, "q": q, "kv": kv, "cu_seqlens_q": rows, "cu_seqlens_k": keys, **change}
        with pytest.raises(InvalidRequest, match=match):
            attend_pack(**given, scale=SCALE)  # type: ignore[arg-type]

    refused("6 plans", plans=plans[:-1])
    refused("q must be", q=q[:-1])
    refused("k must be", kv=KVStorage(kv.k[1:], kv.v[1:]))
    refused("sequence 1: plan: made for 33 rows", plans=[plans[0], plans[0], *plans[2:]])
    refused("ascend", cu_seqlens_q=[0, 0, *rows[2:]])
    refused("ascend", cu_seqlens_k=[1, *keys[1:]])
    refused("sequence 2: .* rows and 48 keys", cu_seqlens_k=[*keys[:3], keys[3] - 2, *keys[4:]])
