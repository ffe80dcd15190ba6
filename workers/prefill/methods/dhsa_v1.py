"""DHSA, first version: the context is cut where a trained network sees a border, and chunks are ranked instead of tiles."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import CorruptBlock, InvalidRequest, Unsupported
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.plan import TileLists, TilePlan
from winnow.workers.prefill import calibration
from winnow.workers.prefill.base import TileListMethod, prefill_methods
from winnow.workers.prefill.calibration import Calibration
from winnow.workers.prefill.chunk_borders import MOST_REACH, BorderPredictor, parameter_shapes, pick_borders
from winnow.workers.prefill.scoring import slabs

if TYPE_CHECKING:
    from winnow.workers.attention.backend import RawQK
    from winnow.workers.model.loader import LoadedModel


@dataclass(frozen=True, eq=False)
class Predictors:
    """Border predictors of a model's layers, on one device.

    Attributes:
        of_layer: one for each layer.
        digest: of the file they came from, "" where they came from none.
    """

    of_layer: tuple[BorderPredictor, ...]
    digest: str = ""

    @classmethod
    def of(cls, tensors: dict[str, Tensor], n_layers: int, channels: int, device: torch.device, digest: str = "") -> Predictors:
        """From the tensors that training made: the parameters [P, ...] for P = 1, shared by all layers, or P = n_layers,
        mean and deviation [n_layers, C], reach [].

        Raises:
            CorruptBlock: shapes that do not fit the model, or numbers that are not finite or make no sense.
        """
        params, reach = parameter_shapes(channels), calibration.whole_number(tensors.get("reach"), 1, MOST_REACH)
        spread = {"mean": (n_layers, channels), "deviation": (n_layers, channels)}
        found = {name: tensors[name] for name in (*params, *spread) if name in tensors}
        shapes = {name: (*tensor.shape,) for name, tensor in found.items()}
        n_stacks = next((n for n in (1, n_layers) if shapes == {name: (n, *own) for name, own in params.items()} | spread), 0)
        if reach is None or not n_stacks or not calibration.are_numbers(found.values()) or bool((found["deviation"] <= 0).any()):
            raise CorruptBlock("dhsa-v1: its calibration does not fit this model; run `winnow calibrate dhsa-v1` again")
        ready = {name: tensor.to(device, torch.float32) for name, tensor in found.items()}
        stacks = [{name: ready[name][i] for name in params} for i in range(n_stacks)]
        return cls(
            tuple(BorderPredictor(stacks[i % n_stacks], ready["mean"][i], ready["deviation"][i], reach) for i in range(n_layers)),
            digest,
        )


@prefill_methods.register("dhsa-v1")
@dataclass(frozen=True)
class DHSAv1(TileListMethod):
    """Each block of queries reads the `budget` tokens whose chunks score best; all heads of a layer share them.

        query block:  sum of its queries / sqrt(its length)      (the mean times sqrt(length): a long chunk is not washed out)
        chunk:        sum of its keys / sqrt(its length)
        token score = its chunk's . its block's product; forced: the first `global_tokens`, the last `local` ones

    Source: "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (arXiv 2510.24606), sections 3.1
    to 3.3, and its published code's constants. Block-sparse masks of its second version are `dhsa`. Deviations:
    - of equal scores the earlier token is taken: of the last chunk that fits in part, the beginning;
    - blocks that hold one of the last `instruction` rows are dense as a whole, and every block reads all of its own keys;
    - borders are the largest scores of their surroundings, found at once instead of one after the other;
    - runs for M > N and any length; neither borders nor masks are shared between layers;
    - `chunk_tokens` gives chunks of equal length, to see what the predictor adds.
    The last rows and the number of borders in the whole text steer all rows: not prefix-safe. Layers with a sliding window,
    and prompts within the budget, are left dense.

    Attributes:
        budget: keys a block chooses, the first `global_tokens` and the last `local` ones among them. Those of its own keys that
            it did not choose come on top: up to block - local of them, and up to block - 1 tokens before them where M - N is
            no multiple of block, since its own keys then lie across two tiles, both of which are read.
        block: queries that share a choice: 32, 64 or 128.
        local: last tokens, up to the block's end, always read. global_tokens: first tokens, always read.
        instruction: last tokens of the prompt, where a border is and rows are dense.
        threshold: borders score above it; a logit.
        apart: tokens on either side of a border that hold no other one: the next is apart + 1 tokens away at least.
        borders_per_block: most borders for every `block` tokens of the text.
        chunk_tokens: length of chunks; 0 = the trained predictor's borders.
    """

    caps = Capabilities(
        chunked=False,
        prefix_safe=False,
        fallback="dense",
        training="calibration",
        notes="chunks with trained borders, or of one length with chunk_tokens and no calibration; one choice for all heads",
    )
    budget: int = 2048
    block: int = 128
    local: int = 128
    global_tokens: int = 128
    instruction: int = 64
    threshold: float = 1.1
    apart: int = 8
    borders_per_block: int = 8
    chunk_tokens: int = 0
    _predictors: Predictors | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.block not in (32, 64, 128):
            raise InvalidRequest(f"dhsa-v1: block must be 32, 64 or 128, got {self.block}; 128 is the published default")
        for name, least in (
            ("local", 1), ("global_tokens", 0), ("instruction", 0), ("apart", 1), ("borders_per_block", 1), ("chunk_tokens", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise InvalidRequest(f"dhsa-v1: {name} must be {least} or more, got {getattr(self, name)}")
        if self.budget < self.local + self.global_tokens:
            raise InvalidRequest(
                f"dhsa-v1: budget must be at least local + global_tokens = {self.local + self.global_tokens}, got {self.budget}"
            )
        if self.threshold != self.threshold:
            raise InvalidRequest("dhsa-v1: threshold must be a number, got nan; 1.1 is the published default")

    def bind(self, model: LoadedModel) -> DHSAv1:
        """A copy with the model's predictors, or itself where chunks have a fixed length.

        Raises:
            Unsupported: not trained for this model. CorruptBlock: its file is damaged.
        """
        if self.chunk_tokens:
            return self
        found = calibration.load(self.name, model.fingerprint)
        spec = model.spec
        return self.with_predictors(_predictors(found, spec.n_layers, spec.n_kv_heads * spec.head_size, model.decoder.device))

    def with_predictors(self, predictors: Predictors) -> DHSAv1:
        """A copy that cuts with these predictors."""
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "_predictors", predictors)
        return copy

    @property
    def calibration_id(self) -> str:
        return self._predictors.digest if self._predictors is not None else ""

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """For all heads: a block's own keys as tiles, the tokens it chose as single keys. See the class.

        Cost: O(M C^2 reach) for the borders, O(nQ chunks D) for the scores, O(nQ M) for the lists.

        Raises:
            Unsupported: chunk_tokens = 0 without `bind`.
        """
        n, m, b = q.shape[2], k.shape[2], self.block
        if m <= self.budget or layer.window:
            return None
        chunks = Chunks.between(self.borders(k, layer), self._most_borders(m) + 2)
        scores = chunks.scores(q, k, b)
        n_q = scores.shape[1]
        ids = torch.zeros(q.shape[0], n_q, self.budget, dtype=torch.int32, device=q.device)
        count = torch.zeros(q.shape[0], n_q, dtype=torch.int64, device=q.device)
        key, slot = torch.arange(m, dtype=torch.int32, device=q.device), torch.arange(self.budget, device=q.device)
        for _, first, stop in slabs(1, n_q, m, 1, 20 * q.shape[0]):
            last = (torch.arange(first + 1, stop + 1, device=q.device) * b).clamp(max=n) - 1 + (m - n)  # of each block
            chosen = TileLists.from_mask(self._tokens(scores[:, first:stop], last, chunks, key))
            at = (chosen.offsets[:-1, None] + slot).clamp(max=chosen.ids.numel() - 1)
            ids[:, first:stop] = chosen.ids[at].unflatten(0, (q.shape[0], -1))
            count[:, first:stop] = chosen.counts().unflatten(0, (q.shape[0], -1))
        valid = slot < count.unsqueeze(-1)
        mask = torch.zeros(q.shape[0], 1, n_q, -(-m // b), dtype=torch.bool, device=q.device)
        if self.instruction:
            mask[:, :, max(0, n - self.instruction) // b :] = True
        columns = TileLists.from_ids(ids, valid)  # from_mask drops those in the blocks' own tiles
        return TilePlan.from_mask(
            mask, n_rows=n, n_keys=m, block_q=b, block_k=b, token_columns=columns, mean_correction=self.correction
        )

    def borders(self, k: Tensor, layer: LayerSpec) -> Tensor:
        """[B, M] bool: the tokens of k [B, Hkv, M, D] that begin a chunk; token 0 does. Raises Unsupported: see `plan`."""
        batch, _, m, _ = k.shape
        key = torch.arange(m, device=k.device)
        if self.chunk_tokens:
            borders = (key % min(self.chunk_tokens, m) == 0).expand(batch, m)
        else:
            if self._predictors is None:
                raise Unsupported(
                    "dhsa-v1: has no border predictor; bind it to a model that it was trained for, or give chunk_tokens"
                )
            predictor = self._predictors.of_layer[layer.idx]
            scores = torch.stack([predictor.scores(keys) for keys in k.transpose(1, 2).flatten(2)])
            borders = pick_borders(scores, threshold=self.threshold, apart=self.apart, most=self._most_borders(m))
        return borders | (key == 0) | (key == m - min(self.instruction, m))

    def _most_borders(self, m: int) -> int:
        if self.chunk_tokens:
            return -(-m // self.chunk_tokens)
        return min(m, max(1, m // self.block) * self.borders_per_block)

    def _tokens(self, scores: Tensor, last: Tensor, chunks: Chunks, key: Tensor) -> Tensor:
        """[B, blocks, M] bool: the tokens that blocks read, `budget` of them at most.

        Args:
            scores: [B, blocks, C]. last: [blocks], position of each block's last row. key: [M] int32, 0 to M - 1.
        """
        end = last[:, None] + 1
        low, high = self.global_tokens, (end - self.local).clamp(min=0)  # what lies between is chosen from
        begin = chunks.starts.clamp(min=low).unsqueeze(1)  # [B, 1, C]
        size = (torch.minimum((chunks.starts + chunks.lengths).unsqueeze(1), high) - begin).clamp(min=0)  # [B, blocks, C]
        left = self.budget - end.clamp(max=low + self.local)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        ranked = size.gather(-1, order)
        before = ranked.cumsum(-1) - ranked
        take = torch.zeros_like(size).scatter_(-1, order, torch.minimum(ranked, (left - before).clamp(min=0)))
        of_key = chunks.of_key.unsqueeze(1).expand(-1, len(last), -1)  # [B, blocks, M]
        low_key = begin.int().gather(-1, of_key[:, :1])  # the maps below are the cost of it all: half as many bytes
        high_key = (begin + take).int().gather(-1, of_key)
        chosen = (key >= low_key) & (key < high_key)
        return (chosen | (key < low) | (key >= high.int())) & (key < end.int())


@dataclass(frozen=True, eq=False)
class Chunks:
    """A text of M tokens cut into at most C chunks; the arrays are padded with empty chunks at M.

    Attributes:
        of_key: [B, M] int64, each token's chunk. starts, lengths: [B, C] int64, in tokens.
    """

    of_key: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def between(cls, borders: Tensor, most: int) -> Chunks:
        """From borders [B, M] bool, token 0 being one; there are `most` at most."""
        m = borders.shape[-1]
        key = torch.arange(m, device=borders.device)
        starts = torch.where(borders, key, m).sort(dim=-1).values[:, :most]
        ends = torch.nn.functional.pad(starts[:, 1:], (0, 1), value=m)
        return cls(borders.cumsum(-1) - 1, starts, ends - starts)

    def scores(self, q: Tensor, k: Tensor, block: int) -> Tensor:
        """[B, nQ, C] float32: (sum of a block's queries / sqrt(size)) . (sum of a chunk's keys / sqrt(size)), heads averaged.

        Args:
            q: [B, Hq, N, D]. k: [B, Hkv, M, D]. block: queries of a block.
        """
        n = q.shape[2]
        rows = torch.nn.functional.pad(q.mean(1, dtype=torch.float32), (0, 0, 0, -n % block)).unflatten(1, (-1, block)).sum(2)
        sizes = torch.full((rows.shape[1], 1), float(block), device=q.device)
        sizes[-1] -= -n % block
        means = k.mean(1, dtype=torch.float64).transpose(1, 2).contiguous()  # a scan along the last axis is 50 times faster
        upto = torch.nn.functional.pad(means.cumsum(-1), (1, 0)).transpose(1, 2)  # sums of differences of sums
        at = torch.stack((self.starts, self.starts + self.lengths), -1).flatten(1).unsqueeze(-1).expand(-1, -1, k.shape[3])
        edges = upto.gather(1, at).unflatten(1, (-1, 2))  # [B, C, 2, D]
        keys = (edges[:, :, 1] - edges[:, :, 0]).float() / self.lengths.clamp(min=1).sqrt().unsqueeze(-1)
        return torch.matmul(rows / sizes.sqrt(), keys.transpose(-1, -2))


@functools.lru_cache(maxsize=4)
def _predictors(found: Calibration, n_layers: int, channels: int, device: torch.device) -> Predictors:
    """One copy on the device however many requests are bound."""
    return Predictors.of(dict(found.tensors), n_layers, channels, device, found.digest)
