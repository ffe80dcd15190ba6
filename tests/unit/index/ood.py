"""Keys and queries that lie apart, as they do in attention: queries are out of the keys' distribution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def _rope(x: Floats, positions: NDArray[np.int64], theta: float = 10_000.0) -> Floats:
    half = x.shape[1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=1).astype(
        np.float32
    )


def keys_and_queries(n: int, n_queries: int, d: int = 64, seed: int = 0) -> tuple[Floats, Floats]:
    """Keys [n, d] at positions 0..n-1 and decode queries [n_queries, d] at positions from n on.

    Rank-24 latent topics in blocks of 256 tokens, K = z A' + mean + noise, Q = z B' + another mean + noise with
    B = B0 + 0.35 A, then rotary embedding.
    """
    rng = np.random.default_rng(seed)
    rank = 24
    a, b0 = rng.standard_normal((d, rank)), rng.standard_normal((d, rank))
    b = b0 + 0.35 * a
    topics = rng.standard_normal((n // 256 + 1, rank))
    z_k = topics[np.arange(n) // 256] + 0.7 * rng.standard_normal((n, rank))
    z_q = topics[rng.integers(0, len(topics), n_queries)] + 0.7 * rng.standard_normal((n_queries, rank))
    k = z_k @ a.T / rank**0.5 + 2 * rng.standard_normal(d) + 0.3 * rng.standard_normal((n, d))
    q = z_q @ b.T / rank**0.5 + 2 * rng.standard_normal(d) + 0.3 * rng.standard_normal((n_queries, d))
    return _rope(k.astype(np.float32), np.arange(n)), _rope(q.astype(np.float32), n + np.arange(n_queries))


def recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Share of each row's true ids that were found."""
    return float(np.mean([len(set(f) & set(t)) / len(t) for f, t in zip(found.tolist(), truth.tolist(), strict=True)]))
