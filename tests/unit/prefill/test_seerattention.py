"""SeerAttention's gate, selection and oracle against their definitions, and against a real tiny model's q and k."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from method_matrix import seerattention as with_random_gates
from torch import Tensor
from workloads import Shape, s1_noise, s2_verticals, s7_mixture

from winnow.errors import CorruptBlock, InvalidRequest, Unsupported
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.reference import visible
from winnow.workers.model.spec import FAMILIES, RopeSpec
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill import calibration, scoring
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.methods.seerattention import (
    BLOCK,
    Gates,
    SeerAttention,
    gate_frequencies,
    gate_logits,
    largest_tiles,
    pool_keys,
)
from winnow.workers.prefill.pre_rope import PreRope
from winnow.workers.prefill.scoring import diagonal_tiles, forbidden_tiles
from winnow.workers.prefill.tile_truth import normalised, tile_probabilities

pytestmark = pytest.mark.slow

LAYER = LayerSpec(0, 4, 2, 32, 1 / math.sqrt(32))
HEADS = ((0, 1, 2, 3), (0, 1))


def gated(**params: object) -> PrefillMethod:
    return with_random_gates(params, *HEADS)


def plan_of(method: PrefillMethod, q: Tensor, k: Tensor, layer: LayerSpec = LAYER) -> TilePlan:
    plan = method.plan(q, k, layer)
    assert plan is not None
    plan.check()
    return plan


def naive_probabilities(q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
    logits = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * layer.scale
    if layer.softcap:
        logits = torch.tanh(logits / layer.softcap) * layer.softcap
    return logits.masked_fill(~visible(q.shape[2], k.shape[2], layer.window), -torch.inf).softmax(-1)


@pytest.mark.parametrize("slab_bytes", [1 << 30, 1])
@pytest.mark.parametrize("layer", [LAYER, dataclasses.replace(LAYER, softcap=2.0), dataclasses.replace(LAYER, window=100)])
@pytest.mark.parametrize("shape", [Shape(320, 320, batch=2), Shape(301, 301), Shape(150, 333), Shape(1, 257)])
def test_tile_truth_equals_pooled_softmax(
    shape: Shape, layer: LayerSpec, slab_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SLAB_BYTES", slab_bytes)
    x = s7_mixture(shape, 1)
    largest, mass = tile_probabilities(x.q, x.k, layer, BLOCK)
    weights = naive_probabilities(x.q, x.k, layer)
    for i in range(-(-shape.n // BLOCK)):
        for j in range(-(-shape.m // BLOCK)):
            tile = weights[:, :, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            torch.testing.assert_close(largest[:, :, i, j].double(), tile.amax((2, 3)), atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(mass[:, :, i, j].double(), tile.sum(3).mean(2), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:3]))
    torch.testing.assert_close(normalised(largest).sum(-1), torch.ones(mass.shape[:3]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pre_rope_vectors_come_back_from_the_rotated_ones(tmp_path: Path, family: str, dtype: str) -> None:
    model = load_model(str(make_tiny_model(tmp_path, family)), dtype=dtype, device="cpu")
    n = 200
    seen: list[tuple[LayerSpec, Tensor, Tensor, RawQK]] = []

    class Recorder:
        def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
            seen.append((layer, q, k, raw))
            return attend_plan(None, q[None], k[None], v[None], scale=layer.scale)[0][0]

    tokens = torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(0))
    model.decoder.forward(tokens, torch.arange(n), Recorder())
    undo = PreRope(model.spec, model.decoder.dtype, torch.device("cpu")).undo
    tolerance = 1e-5 if dtype == "fp32" else 8e-3  # of the vector: half a unit in the last place of bf16, in both of a pair
    for layer, q, k, raw in seen:
        for rotated, before in ((q, raw.q), (k, raw.k)):
            for first in (0, 70):
                back = undo(rotated[None, :, first:], layer.idx, first)[0]
                error = (back - before[:, first:].float()).norm(dim=-1)
                assert bool((error <= tolerance * before[:, first:].float().norm(dim=-1)).all())


def test_pre_rope_undoes_a_scaled_table(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    model = load_model(str(make_tiny_model(tmp_path, rope_parameters=yarn)), device="cpu", dtype="fp32")
    assert model.spec.ropes[0].scaling != 1.0
    x = torch.randn(1, 4, 100, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(100)
    heads = model.decoder.begin(positions, positions)[1][0]
    from winnow.workers.model.rope import rotate

    turned = rotate(x[0].transpose(0, 1), *heads).transpose(0, 1)[None]
    back = PreRope(model.spec, torch.float32, torch.device("cpu")).undo(turned, 0, 0)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(192, 192), (100, 301), (64, 129)])
def test_gate_equals_its_formula_tile_by_tile(n: int, m: int) -> None:
    gen = torch.Generator().manual_seed(n)
    hq, hkv, d, g = 4, 2, 8, 6
    q, k = torch.randn(1, hq, n, d, generator=gen), torch.randn(1, hkv, m, d, generator=gen)
    q_map, k_map = torch.randn(hq, d, g, generator=gen), torch.randn(hkv, 3 * d, g, generator=gen)
    frequencies = torch.tensor([0.9, 0.1, 0.01])
    pooled_k = pool_keys(k, BLOCK)
    pooled_q = scoring.pool_mean(q, BLOCK)
    found = gate_logits(pooled_q, pooled_k, q_map, k_map, frequencies, first_position=m - n)

    def turned(x: Tensor, position: int) -> Tensor:
        pairs = torch.view_as_complex(torch.stack((x[: g // 2], x[g // 2 :]), -1))
        return torch.view_as_real(pairs * torch.polar(torch.ones(3), position * frequencies)).T.flatten()

    for h in range(hq):
        for i in range(-(-n // BLOCK)):
            mean = q[0, h, i * BLOCK : (i + 1) * BLOCK].mean(0)
            query = turned(mean @ q_map[h], m - n + i * BLOCK)
            for j in range(-(-m // BLOCK)):
                keys = k[0, h // 2, j * BLOCK : (j + 1) * BLOCK]
                pooled = torch.cat((keys.amax(0), keys.amin(0), keys.mean(0)))
                key = turned(pooled @ k_map[h // 2], j * BLOCK)
                torch.testing.assert_close(found[0, h, i, j], query @ key / math.sqrt(g), atol=1e-4, rtol=1e-4)


def test_gate_frequencies_are_the_models_at_its_width_and_evenly_picked_below() -> None:
    rope = RopeSpec(tuple((1e4 ** -(torch.arange(8) / 8)).tolist()))
    assert torch.equal(gate_frequencies(rope, 16), torch.tensor(rope.inv_freq))
    assert torch.equal(gate_frequencies(rope, 8), torch.tensor(rope.inv_freq)[::2])
    assert gate_frequencies(rope, 6).shape == (3,)


@pytest.mark.parametrize("n_k", [4, 16, 33])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_density_is_the_share_of_causal_tiles_that_is_kept(n_k: int, density: float) -> None:
    """Within one tile in nK, or what the diagonal alone takes."""
    n = n_k * BLOCK
    forbidden, diagonal = forbidden_tiles(n, n, BLOCK, BLOCK, "cpu"), diagonal_tiles(n, n, BLOCK, BLOCK, "cpu")
    scores = torch.randn(3, n_k, n_k, generator=torch.Generator().manual_seed(0))
    kept = largest_tiles(scores, density, forbidden, diagonal)
    causal = n_k * (n_k + 1) // 2
    share = kept.sum((1, 2)) / causal
    assert bool((kept & forbidden).sum() == 0) and bool((kept | ~diagonal).all())
    assert bool((share <= max(density, 2 / (n_k + 1)) + 1 / n_k).all()) and bool((share >= density - 1 / n_k).all())


@pytest.mark.parametrize("params", [{"density": 0.3}, {"threshold": 0.25}, {"density": 0.3, "oracle": True}])
@pytest.mark.parametrize("step", [64, 192])
def test_chunks_of_whole_tiles_give_the_one_shot_plan(params: dict[str, object], step: int) -> None:
    x = s7_mixture(Shape(640, 640), 3)
    whole = plan_of(gated(**params), x.q, x.k).to_dense_mask()
    assert 0.1 < float(whole.float().mean()) < 0.45
    for start in range(0, 640, step):
        stop = min(start + step, 640)
        part = gated(**params).plan(x.q[:, :, start:stop], x.k[:, :, :stop], LAYER)
        if part is None:
            assert stop <= BLOCK
            continue
        assert torch.equal(part.to_dense_mask(), whole[:, :, start:stop, :stop])


@pytest.mark.parametrize("params", [{"density": 0.3}, {"threshold": 0.25}, {"oracle": True}])
def test_what_follows_changes_no_earlier_row_of_tiles(params: dict[str, object]) -> None:
    x = s7_mixture(Shape(512, 512), 4)
    before = plan_of(gated(**params), x.q, x.k).tile_mask()
    q, k = x.q.clone(), x.k.clone()
    q[:, :, 256:] = -2 * q[:, :, 256:]
    k[:, :, 256:] = 3 * k[:, :, 256:]
    after = plan_of(gated(**params), q, k).tile_mask()
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before, after)


def test_thresholds_are_shares_of_the_rows_softmax() -> None:
    x = s1_noise(Shape(640, 640), 5)
    sizes = [int(plan_of(gated(threshold=t), x.q, x.k).tile_mask().sum()) for t in (0.0, 0.01, 0.1, 0.3, 1.0)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    assert sizes[0] == 4 * 55  # everything causal
    assert 4 * 10 <= sizes[-1] <= 4 * 11  # the diagonal, and where one tile rounds to all of its row


def test_slabs_of_heads_give_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    x = s7_mixture(Shape(301, 640), 6)
    for params in ({"density": 0.3}, {"threshold": 0.1}, {"oracle": True, "density": 0.3}):
        whole = plan_of(gated(**params), x.q, x.k).tile_mask()
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "SLAB_BYTES", 1)
            assert torch.equal(whole, plan_of(gated(**params), x.q, x.k).tile_mask())


def test_the_oracle_keeps_the_tiles_with_the_largest_probability_and_beats_a_random_gate() -> None:
    x = s2_verticals(Shape(640, 640), 7, columns=3)
    weights = naive_probabilities(x.q, x.k, LAYER)
    recalls = {}
    for name, method in (("oracle", SeerAttention(density=0.4, oracle=True)), ("random", gated(density=0.4))):
        recalls[name] = float((weights * plan_of(method, x.q, x.k).to_dense_mask()).sum(-1).mean())
    mask = plan_of(SeerAttention(density=0.4, oracle=True), x.q, x.k).tile_mask()
    for column in x.planted["columns"]:
        assert bool(mask[:, :, 9, column // BLOCK].all())
    assert recalls["oracle"] > recalls["random"] + 0.1


def test_single_tiles_stay_dense() -> None:
    x = s1_noise(Shape(128, 128))
    assert gated().plan(x.q, x.k, LAYER) is not None
    assert gated().plan(x.q[:, :, :64], x.k[:, :, :64], LAYER) is None


@pytest.mark.parametrize(
    ("params", "field"), [({"threshold": -0.1}, "threshold"), ({"threshold": 1.1}, "threshold"), ({"density": 2.0}, "density")]
)
def test_parameters_out_of_range_are_refused_by_name(params: dict[str, float], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"seerattention: {field} must be"):
        SeerAttention(**params)  # type: ignore[arg-type]


def test_without_gates_or_with_those_of_other_heads_it_refuses() -> None:
    x = s1_noise(Shape(128, 128))
    with pytest.raises(Unsupported, match="no gates are bound"):
        SeerAttention().plan(x.q, x.k, LAYER)
    with pytest.raises(InvalidRequest, match="4 query and 2 KV heads of size 32, got 4 and 4"):
        gated().plan(x.q, x.k.repeat_interleave(2, 1), LAYER)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path / "home"))
    return load_model(str(make_tiny_model(tmp_path / "model")), device="cpu", dtype="fp32")


def test_bind_takes_the_models_gates_and_names_them(model: LoadedModel) -> None:
    with pytest.raises(Unsupported, match="winnow calibrate seerattention"):
        SeerAttention().bind(model)
    assert SeerAttention(oracle=True).bind(model) == SeerAttention(oracle=True)
    gen = torch.Generator().manual_seed(0)
    tensors = {"q": torch.randn(2, 4, 16, 8, generator=gen).half(), "k": torch.randn(2, 2, 48, 8, generator=gen).half()}
    calibration.save("seerattention", model.fingerprint, tensors, {"data": "none"})
    unbound = SeerAttention(density=0.5)
    method = unbound.bind(model)
    assert unbound.gates is None and unbound.calibration_id == "" and method.calibration_id and method.density == 0.5
    assert method.gates is not None and method.gates is SeerAttention().bind(model).gates  # one copy for all requests
    torch.testing.assert_close(method.gates.k, tensors["k"].float())
    layer = model.spec.layers[1]
    q, k = torch.randn(1, 4, 256, 16, generator=gen), torch.randn(1, 2, 256, 16, generator=gen)
    assert 0.4 < plan_of(method, q, k, layer).density() < 0.7
    calibration.save("seerattention", model.fingerprint, {**tensors, "q": -tensors["q"]}, {})
    assert unbound.bind(model).calibration_id != method.calibration_id


@pytest.mark.parametrize("name", ["q", "k"])
def test_gates_that_do_not_fit_the_model_are_refused(model: LoadedModel, name: str) -> None:
    tensors = {"q": torch.zeros(2, 4, 16, 8), "k": torch.zeros(2, 2, 48, 8)}
    calibration.save("seerattention", model.fingerprint, {**tensors, name: torch.zeros(2, 3, 16, 8)}, {})
    with pytest.raises(CorruptBlock, match="do not fit this model"):
        SeerAttention().bind(model)
    calibration.save("seerattention", model.fingerprint, {key: x for key, x in tensors.items() if key != name}, {})
    with pytest.raises(CorruptBlock, match="do not fit this model"):
        SeerAttention().bind(model)


@pytest.mark.parametrize("width", [0, 7])
def test_gates_of_an_odd_width_or_none_are_refused(model: LoadedModel, width: int) -> None:
    tensors = {"q": torch.zeros(2, 4, 16, width), "k": torch.zeros(2, 2, 48, width)}
    with pytest.raises(CorruptBlock, match="do not fit this model"):
        Gates.of(tensors, model.spec, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gates_that_are_not_finite_are_refused(model: LoadedModel, name: str, value: float) -> None:
    tensors = {"q": torch.zeros(2, 4, 16, 8), "k": torch.zeros(2, 2, 48, 8)}
    assert Gates.of(tensors, model.spec, torch.float32, torch.device("cpu")).q.shape[3] == 8
    tensors[name][1, 1, 3, 5] = value
    with pytest.raises(CorruptBlock, match="do not fit this model"):
        Gates.of(tensors, model.spec, torch.float32, torch.device("cpu"))


class Cached:
    """Keeps a prompt's rotated keys and values, as the engine does, and attends by a method's plans."""

    def __init__(self, method: PrefillMethod) -> None:
        self.method = method
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.densities: list[float] = []

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        if layer.idx in self.cache:
            k, v = (torch.cat((old, new), 1) for old, new in zip(self.cache[layer.idx], (k, v), strict=True))
        self.cache[layer.idx] = (k.clone(), v.clone())
        plan = self.method.plan(q[None], k[None], layer, raw)
        self.densities.append(1.0 if plan is None else plan.density())
        return attend_plan(plan, q[None], k[None], v[None], scale=layer.scale)[0][0]


@pytest.mark.parametrize("params", [{"density": 0.3}, {"threshold": 0.05}])
@pytest.mark.parametrize("step", [64, 320])
def test_a_real_model_reads_a_prompt_in_chunks_as_in_one_piece(model: LoadedModel, params: dict[str, float], step: int) -> None:
    """Earlier keys are there rotated only: the gate must see in them what it saw when they were new."""
    gen = torch.Generator().manual_seed(0)
    tensors = {"q": torch.randn(2, 4, 16, 8, generator=gen), "k": torch.randn(2, 2, 48, 8, generator=gen)}
    calibration.save("seerattention", model.fingerprint, tensors, {})
    method = SeerAttention(**params).bind(model)  # type: ignore[arg-type]
    ids = torch.randint(3, 300, (900,), generator=gen)
    one = Cached(method)
    whole = model.decoder.forward(ids, torch.arange(900), one)
    assert max(one.densities) < 0.8
    chunked = Cached(method)
    pieces = [model.decoder.forward(ids[i : i + step], torch.arange(i, min(i + step, 900)), chunked) for i in range(0, 900, step)]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-4, rtol=1e-4)
