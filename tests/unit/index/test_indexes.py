"""The indexes behind one interface: the same answers as plain inner products, counted work, files that notice damage."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from winnow.errors import CorruptBlock, InvalidRequest, UnknownName
from winnow.index.base import KeyIndex, indexes
from winnow.index.flat import FlatIndex
from winnow.index.spec import FLAT_BELOW_KEYS, load_index, make_index, resolve

from .ood import Floats, keys_and_queries, recall

SPECS = ["flat", "ivf16", "ivf16:nprobe=16", "hnsw16", "hnsw8:ef=64,efc=40"]
N, D, NQ = 3000, 64, 40


@pytest.fixture(scope="module")
def data() -> tuple[Floats, Floats]:
    return keys_and_queries(N, NQ, D)


def truth(keys: Floats, q: Floats, k: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.argsort(-(q @ keys.T), axis=1, kind="stable")[:, :k]


def build(spec: str, keys: Floats) -> KeyIndex:
    index = make_index(spec, len(keys))
    index.build(keys)
    return index


@pytest.mark.parametrize("spec", SPECS)
def test_scores_are_inner_products_with_the_keys_as_given(spec: str, data: tuple[Floats, Floats]) -> None:
    keys, q = data
    ids, scores = build(spec, keys).search(q, 20)
    assert ids.shape == scores.shape == (NQ, 20)
    assert (ids.dtype, scores.dtype) == (np.int64, np.float32)
    assert (np.diff(scores, axis=1) <= 1e-4).all(), "best first"
    for row in range(NQ):
        assert len(set(ids[row].tolist())) == 20
        np.testing.assert_allclose(scores[row], keys[ids[row]] @ q[row], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("spec", "floor"), [("flat", 1.0), ("ivf16:nprobe=16", 1.0), ("ivf16:nprobe=8", 0.9), ("hnsw16", 0.9)])
def test_recall_against_flat_on_queries_outside_the_keys_distribution(
    spec: str, floor: float, data: tuple[Floats, Floats]
) -> None:
    keys, q = data
    index = build(spec, keys)
    assert recall(index.search(q, 100)[0], truth(keys, q, 100)) >= floor - 1e-9


@pytest.mark.slow
def test_graph_scans_a_small_share_of_many_keys_and_centring_is_what_makes_it_work() -> None:
    keys, q = keys_and_queries(20_000, 30, D, seed=1)
    wanted = truth(keys, q, 100)
    index = build("hnsw32", keys)
    found, _ = index.search(q, 100)
    share = index.stats.keys_scanned / (len(q) * len(keys))
    assert recall(found, wanted) >= 0.9
    assert share <= 0.35
    shifted = build("hnsw32", keys + 40.0)  # a large common mean: without centring this ruins a graph of inner products
    assert recall(shifted.search(q, 100)[0], wanted) >= 0.9


def test_keys_scanned_counts_what_was_scored(data: tuple[Floats, Floats]) -> None:
    keys, q = data
    flat, ivf, hnsw = build("flat", keys), build("ivf16:nprobe=16", keys), build("hnsw16", keys)
    for index in (flat, ivf, hnsw):
        index.search(q, 10)
        assert index.stats.n_searches == NQ
    assert flat.stats.keys_scanned == NQ * N
    assert ivf.stats.keys_scanned == NQ * (N + 16), "every list, and the centroids"
    assert NQ * 200 <= hnsw.stats.keys_scanned < NQ * N
    part = build("ivf16:nprobe=4", keys)
    part.search(q, 10)
    assert NQ * 16 < part.stats.keys_scanned < ivf.stats.keys_scanned / 2


def test_overlapping_graph_searches_do_not_count_each_others_work(data: tuple[Floats, Floats]) -> None:
    keys, q = data
    a, b = build("hnsw16", keys), build("hnsw16", keys)
    a.search(q, 10)
    alone = a.stats.keys_scanned
    b.search(q, 10)
    start = threading.Barrier(2)

    def search(index: KeyIndex) -> None:
        start.wait(30)
        for _ in range(20):
            index.search(q, 10)

    threads = [threading.Thread(target=search, args=(index,)) for index in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index in (a, b):
        assert index.stats.keys_scanned == pytest.approx(21 * alone, rel=0.02)


@pytest.mark.parametrize("spec", SPECS)
def test_appended_keys_are_found_exactly_and_keep_their_ids(spec: str, data: tuple[Floats, Floats]) -> None:
    keys, q = data
    index = build(spec, keys[:2500])
    old_ids, _ = index.search(q, 50)
    index.append(keys[2500:2600])
    index.append(keys[2600:])
    assert index.n_keys == N
    ids, scores = index.search(q, 50)
    for row in range(NQ):
        np.testing.assert_allclose(scores[row], keys[ids[row]] @ q[row], rtol=1e-4, atol=1e-3)
        best_new = set(truth(keys, q[row : row + 1], 50)[0].tolist()) & set(range(2500, N))
        assert best_new <= set(ids[row].tolist()), "a new key among the best is never missed"
        assert {i for i in ids[row].tolist() if i < 2500} <= set(old_ids[row].tolist()) | set(range(2500, N))


@pytest.mark.parametrize("spec", SPECS)
def test_k_beyond_the_keys_returns_them_all_or_marks_the_missing(spec: str, data: tuple[Floats, Floats]) -> None:
    keys, q = data
    index = build(spec, keys[:30])
    ids, scores = index.search(q, 1000)
    assert ids.shape[1] == 30
    if spec in ("flat", "ivf16:nprobe=16"):
        assert all(sorted(row) == list(range(30)) for row in ids.tolist())
    assert (np.isneginf(scores) == (ids < 0)).all()


@pytest.mark.parametrize("spec", SPECS)
def test_a_saved_index_answers_as_before(spec: str, data: tuple[Floats, Floats], tmp_path: Path) -> None:
    keys, q = data
    index = build(spec, keys[:2500])
    index.append(keys[2500:])
    index.save(tmp_path / "index")
    again = load_index(index.name, tmp_path / "index")
    assert type(again) is type(index)
    assert again.n_keys == N
    for ours, theirs in zip(index.search(q, 30), again.search(q, 30), strict=True):
        assert np.array_equal(ours, theirs)
    again.append(keys[:5])
    assert again.n_keys == N + 5


@pytest.mark.promise("R21")
@pytest.mark.parametrize("spec", ["flat", "ivf16", "hnsw16"])
def test_a_damaged_index_file_is_refused(spec: str, data: tuple[Floats, Floats], tmp_path: Path) -> None:
    keys, _ = data
    index = build(spec, keys[:200])
    path = tmp_path / "index"
    index.save(path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, 9, 24, 28, 33, len(good) - 1, *rng.integers(0, len(good), 30).tolist()]:
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 8)
        path.write_bytes(bytes(bad))
        with pytest.raises(CorruptBlock):
            load_index(index.name, path)
    for keep in (0, 8, 31, 100, len(good) - 1):
        path.write_bytes(good[:keep])
        with pytest.raises(CorruptBlock):
            load_index(index.name, path)
    path.write_bytes(good + b"x")
    with pytest.raises(CorruptBlock):
        load_index(index.name, path)


def test_an_index_file_of_another_kind_or_version_is_refused(data: tuple[Floats, Floats], tmp_path: Path) -> None:
    path = tmp_path / "index"
    build("flat", data[0]).save(path)
    with pytest.raises(CorruptBlock, match="of kind flat"):
        load_index("hnsw", path)
    raw = bytearray(path.read_bytes())
    raw[24:28] = (2).to_bytes(4, "little")
    path.write_bytes(bytes(raw))
    with pytest.raises(CorruptBlock, match="format version 2"):
        load_index("flat", path)


@pytest.mark.parametrize(("spec", "n", "built"), [
    ("auto", FLAT_BELOW_KEYS - 1, "flat"), ("auto", FLAT_BELOW_KEYS, "hnsw32"), ("ivf8", 1 << 20, "ivf8"),
])  # fmt: skip
def test_auto_is_flat_for_few_keys_and_a_graph_for_many(spec: str, n: int, built: str) -> None:
    assert resolve(spec, n) == built
    assert make_index(spec, n).name == built.rstrip("0123456789")


@pytest.mark.parametrize("spec", ["nope", "nope32", "attention-graph32", "FLAT", "ivfx256"])
def test_an_unknown_index_lists_the_known_ones(spec: str) -> None:
    with pytest.raises(UnknownName, match="flat, hnsw, ivf"):
        make_index(spec, 10)


@pytest.mark.parametrize(("spec", "word"), [
    ("flat5", "flat"), ("ivf", "nlist"), ("ivf0", "nlist"), ("ivf65537", "nlist"), ("ivf-3", "nlist"), ("ivf1.5", "nlist"),
    ("hnsw", "M"), ("hnsw1", "M"), ("hnsw129", "M"), ("hnsw999999999999999999999", "M"), ("hnsw٣", "M"), ("hnsw32:ef=0", "ef"),
    ("hnsw32:ef=nan", "ef"), ("hnsw32:efs=3", "efs"), ("ivf4:nprobe=5", "nprobe"), ("ivf4:nprobe=", "nprobe"),
    ("flat:x=1", "x"), ("auto:ef=3", "auto"), ("", "name"), ("32", "name"), ("ivf4:nprobe", "key=value"),
])  # fmt: skip
def test_a_bad_number_or_parameter_is_named(spec: str, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        make_index(spec, 10)


def test_shapes_that_do_not_fit_are_refused(data: tuple[Floats, Floats]) -> None:
    keys, q = data
    index = build("flat", keys)
    for call in (lambda: index.search(q[:, :5], 3), lambda: index.search(q[0], 3), lambda: index.append(keys[:, :5]),
                 lambda: index.search(q, 0), lambda: FlatIndex().search(q, 1), lambda: FlatIndex().save(Path("x")),
                 lambda: build("ivf64", keys[:63])):  # fmt: skip
        with pytest.raises(InvalidRequest):
            call()


def test_an_index_of_no_keys_finds_nothing_until_some_are_appended() -> None:
    index = build("flat", np.zeros((0, 4), np.float32))
    ids, scores = index.search(np.ones((2, 4), np.float32), 3)
    assert ids.shape == scores.shape == (2, 0)
    index.append(np.eye(4, dtype=np.float32))
    assert index.search(np.array([[0, 3, 1, 0]], np.float32), 2)[0].tolist() == [[1, 2]]


def test_the_registry_lists_three_indexes() -> None:
    assert {"flat", "hnsw", "ivf"} <= set(indexes.names())
