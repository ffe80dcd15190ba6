"""SEA: a learnt network draws a small attention map for each query; the keys behind its largest cells are read one by one."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import ContextTooLong, CorruptBlock, InvalidRequest, Unsupported
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import HeadClass, TileLists, TilePlan
from winnow.workers.model.spec import ModelSpec
from winnow.workers.prefill import calibration, scoring
from winnow.workers.prefill.base import PrefillMethod, prefill_methods
from winnow.workers.prefill.calibration import Calibration
from winnow.workers.prefill.scoring import keep_top
from winnow.workers.prefill.sea_network import UPSAMPLE, Carry, Sizes, draw_map, key_sums

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel


@dataclass(frozen=True, eq=False)
class Network:
    """The learnt parameters of all layers, [L, ...] float32 each on the model's device, and the calibration's digest."""

    sizes: Sizes
    tensors: Mapping[str, Tensor]
    digest: str = ""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], spec: ModelSpec, device: torch.device, digest: str = "") -> Network:
        """From a calibration's tensors: those of `Sizes.shapes`, rounded by `calibration.rounded` or any float dtype, and
        "longest" [], the length they were trained for.

        Raises:
            CorruptBlock: one is missing, is not finite or does not fit the model.
        """
        longest = calibration.whole_number(tensors.get("longest"), 1, spec.max_context)
        try:
            tensors = calibration.unrounded(tensors)
            knots, features = (tensors[name].shape[1] for name in ("positions", "features"))
            sizes = Sizes(spec.n_q_heads, spec.head_size, longest or 0, features, tensors["map_norm"].shape[2], knots)
            fits = (
                longest is not None
                and min(knots, features, sizes.columns) >= 1
                and sizes.columns % UPSAMPLE == 0
                and all(tensors[name].shape == (spec.n_layers, *shape) for name, shape in sizes.shapes().items())
                and calibration.are_numbers(tensors[name] for name in sizes.shapes())
            )
        except (KeyError, IndexError, ValueError):
            fits = False
        if not fits:
            raise CorruptBlock("sea: its calibration file does not fit this model; run `winnow calibrate sea` again")
        return cls(sizes, {name: tensors[name].to(device, torch.float32) for name in sizes.shapes()}, digest)

    def layer(self, idx: int) -> dict[str, Tensor]:
        return {name: tensor[idx] for name, tensor in self.tensors.items()}


@prefill_methods.register("sea")
@dataclass(frozen=True)
class SEA(PrefillMethod):
    """Read about k keys per head and row: those behind the largest cells of an estimated attention map, over all heads together.

    A network that costs time linear in the length (`sea_network`) draws for each head and row a distribution over a few columns;
    column c of the row at position p stands for the keys j with floor((j + 1/2) columns / (p + 1)) = c. Of a row's cells, all
    heads' together, the largest round(Hq k oversample columns / (p + 1)) are kept, at least one. Their keys are read exactly,
    and the output is

        sigmoid(mix) sigmoid(scale) sparse + (1 - sigmoid(mix)) mean of the values so far

    with both gates drawn by the network.

    Source: "SEA: Sparse Linear Attention with Estimated Attention Mask" (arXiv 2310.01777, ICLR 2024), its causal variant, after
    descriptions of the published code, which has no licence. Everything but the model is new parameters: `winnow calibrate sea`
    distils them from the dense model. Deviations:
    - a plan is made before values are looked at: where the network has values it gets keys;
    - the table of position marks has few rows, with straight lines between them, whatever the longest prompt; published: a row
      for each position;
    - convolutions are causal (kernel 3, dilation 2, over this token and earlier ones), so a row depends on what precedes it only;
    - heads that share keys share them here too; the published code needs equally many query and KV heads;
    - a row always reads its own key, so no head is empty; `sink` more from the start on request;
    - the sparse path described is the only one: training chooses keys by the same cells.
    Not prefix-safe although causal: the rows after a cached prefix would need the queries before it for the convolutions.
    Keys are listed one by one, which no tensor core likes: expect no gain below 16K tokens. Layers with a sliding window are
    left dense.

    Attributes:
        k: keys per head and row to aim at. 7 and 64 are published; more than trained with is allowed and reads more.
        oversample: factor on the number of cells.
        sink: first keys that every row and head reads besides.
        mix: False = the sparse attention alone, both gates 1.
    """

    caps = Capabilities(
        chunked=False,
        prefix_safe=False,
        fallback="dense",
        training="calibration",
        notes="keys one by one from a distilled map of each query; up to the length it was trained for",
    )
    k: int = 64
    oversample: float = 1.0
    sink: int = 0
    mix: bool = True
    network: Network | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InvalidRequest(f"sea: k must be 1 or more keys per head and row, got {self.k}; 64 is published")
        if not 0.0 < self.oversample < math.inf:
            raise InvalidRequest(f"sea: oversample must be above 0, got {self.oversample}; 1 is published")
        if self.sink < 0:
            raise InvalidRequest(f"sea: sink must be 0 or more tokens, got {self.sink}")

    def bind(self, model: LoadedModel) -> SEA:
        """See `PrefillMethod.bind`.

        Raises:
            Unsupported: not calibrated for this model. CorruptBlock: the file is damaged or does not fit the model.
        """
        found = calibration.load(self.name, model.fingerprint)
        return self.with_network(_network(found, model.spec, model.decoder.device))

    def with_network(self, network: Network) -> SEA:
        """A copy that chooses by this network."""
        bound = copy.copy(self)
        object.__setattr__(bound, "network", network)
        return bound

    @property
    def calibration_id(self) -> str:
        """See `PrefillMethod.calibration_id`."""
        return self.network.digest if self.network is not None else ""

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head and row: its keys one by one; the gates' mix as a residual. See the class.

        Cost: O(N Hq (D features + D^2 + columns Hq)) for the map, O(N Hq columns log) to choose, O(N Hq k) entries. Rows are done
        in slabs of about `scoring.SLAB_BYTES`. Mutates nothing.

        Raises:
            Unsupported: no network is bound. InvalidRequest: other heads than it was trained for.
            ContextTooLong: more keys than its position table has.
        """
        n, m = q.shape[2], k.shape[2]
        if layer.window:
            return None
        network = self._checked(q, k)
        cells, gates = self._cells(network, q, k, layer)
        count = self.count(torch.arange(m - n, m), q.shape[1], network.sizes.columns)
        others = keys_of_cells(cells, m, count, self.sink)
        own = torch.arange(m - n, m, device=q.device)[:, None].expand(*q.shape[:3], 1)
        head_class = torch.full(q.shape[:2], HeadClass.CSR, dtype=torch.int8, device=q.device)
        unused = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
        none = TileLists.empty(own.numel(), q.device)
        plan = TilePlan(n, m, 1, 1, head_class, TileLists.from_ids(own), none, unused, unused + 1, token_columns=others)
        return replace(plan, residual=Mix(plan, gates)) if self.mix else plan

    def count(self, positions: Tensor, heads: int, columns: int) -> Tensor:
        """[N] int64: cells that the rows at positions [N] keep, over all heads."""
        wanted = torch.floor(heads * self.k * self.oversample * columns / (positions.double() + 1) + 0.5)
        return wanted.clamp(1, heads * columns).long()

    def choose(self, log_map: Tensor, positions: Tensor) -> Tensor:
        """The largest cells of each row over all heads, ties to the lower head and column: always as many as `count` says, which
        `keys_of_cells` relies on. A cell that is no number counts as the least.

        Args:
            log_map: [B, Hq, N, columns] of the rows at positions [N] int64.

        Returns:
            [B, Hq, N, columns] bool.
        """
        heads, n, columns = log_map.shape[1:]
        finite = log_map.nan_to_num(torch.finfo(log_map.dtype).min)  # infinities become the largest and the least number
        kept = keep_top(finite.transpose(1, 2).flatten(2), self.count(positions, heads, columns))  # [B, N, Hq columns]
        return kept.view(-1, n, heads, columns).transpose(1, 2)

    def _cells(self, network: Network, q: Tensor, k: Tensor, layer: LayerSpec) -> tuple[Tensor, Tensor]:
        """Kept cells [B, Hq, N, columns] bool and gates [B, Hq, N, 2]."""
        batch, hq, n, d = q.shape
        past, p = k.shape[2] - n, network.layer(layer.idx)
        maps = torch.zeros(batch, 2 * hq, 4, network.sizes.columns // UPSAMPLE, device=q.device)
        carry = Carry(key_sums(p, k[:, :, :past], layer.scale, network.sizes.positions), maps, maps)
        step = max(1024, scoring.SLAB_BYTES // (4 * batch * hq * (8 * d + 8 * network.sizes.columns)))
        cells, gates = [], []
        for start in range(0, n, step):
            stop = min(n, start + step)
            rows, keys = q[:, :, start:stop], k[:, :, past + start : past + stop]
            log_map, gate, carry = draw_map(p, rows, keys, past + start, layer.scale, network.sizes.positions, carry)
            cells.append(self.choose(log_map, torch.arange(past + start, past + stop, device=q.device)))
            gates.append(gate)
        return torch.cat(cells, 2), torch.cat(gates, 2)

    def _checked(self, q: Tensor, k: Tensor) -> Network:
        if self.network is None:
            raise Unsupported(
                "sea: no network is bound; let the engine bind it to a model calibrated with `winnow calibrate sea`"
            )
        sizes = self.network.sizes
        if (sizes.heads, sizes.head_size) != (q.shape[1], q.shape[3]):
            raise InvalidRequest(
                f"sea: its network is for {sizes.heads} query heads of size {sizes.head_size}, got {q.shape[1]} of size "
                f"{q.shape[3]}; use the model it was trained for"
            )
        if k.shape[2] > sizes.positions:
            raise ContextTooLong(
                f"sea: its network was trained for at most {sizes.positions} tokens, got {k.shape[2]}; run "
                "`winnow calibrate sea` with more tokens, or pick another method"
            )
        return self.network


@dataclass(frozen=True, eq=False)
class Mix:
    """The residual that turns sparse attention into the gates' mix of it and the running mean of the values.

    With w = sigmoid(scale) sigmoid(mix), merging out' = (1 - sigmoid(mix)) / (1 - w) mean at lse' = lse + ln((1 - w) / w) by
    log-sum-exp gives w sparse + (1 - sigmoid(mix)) mean. The lse of the whole is that of the keys read less ln w: it is
    a number of this method and says nothing about attention mass.

    Attributes:
        plan: the keys read, without residual. gates: [B, Hq, N, 2] float32, scale and mix before their sigmoid.
    """

    plan: TilePlan
    gates: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        """See `ResidualEstimator`. Runs the sparse attention once more for its lse."""
        if q.dtype == torch.float64:  # what plans are checked against is computed in it, and no executor runs it
            q, k, v = (x.float() for x in (q, k, v))
        _, lse = attend_plan(self.plan, q, k, v, scale=scale, softcap=softcap)
        mixed, weight = self.shares()
        mean = running_mean(v, q.shape[2]).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return ((1 - mixed) / (1 - weight)).unsqueeze(-1) * mean, lse + torch.log((1 - weight) / weight)

    def shares(self) -> tuple[Tensor, Tensor]:
        """sigmoid(mix), and w kept off 0 and 1, [B, Hq, N] each."""
        scaled, mixed = torch.sigmoid(self.gates).unbind(-1)
        return mixed, (scaled * mixed).clamp(1e-6, 1 - 1e-6)


def running_mean(v: Tensor, n: int) -> Tensor:
    """Of v [B, H, M, D]: for the last n rows the mean of the values up to each, [B, H, n, D] float32."""
    count = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
    return (v.float().cumsum(2) / count)[:, :, v.shape[2] - n :]


def cell_edges(length: Tensor, columns: int) -> Tensor:
    """[...] int64 keys of a row -> [..., columns + 1] int64: column c stands for the keys edges[c] <= j < edges[c + 1].

    floor((j + 1/2) columns / length) = c  iff  c length / columns - 1/2 <= j < (c + 1) length / columns - 1/2.
    """
    c = torch.arange(columns + 1, device=length.device)
    return (-((columns - 2 * c * length[..., None]) // (2 * columns))).clamp(min=0)


def keys_of_cells(cells: Tensor, m: int, count: Tensor, sink: int = 0) -> TileLists:
    """The keys before each row's own that its cells stand for, and its first `sink` ones. No N x M map, no wait for the device.

    Args:
        cells: [B, Hq, N, columns] bool, rows right-aligned to M keys.
        count: [N] int64 on the CPU, how many cells of a row are set over all heads.

    Returns:
        B * Hq * N rows of keys.
    """
    batch, heads, n, columns = cells.shape
    device, length = cells.device, torch.arange(m - n + 1, m + 1, device=cells.device)
    sink = min(sink, m)  # more lists nothing more, and must not take the room for it
    edges = torch.minimum(cell_edges(length, columns), (length - 1)[:, None]).clamp(min=sink)  # without one's own key
    first, end = edges[:, :-1], edges[:, 1:]
    room = (-(-length // columns))[:, None].expand(-1, columns)  # most keys of a cell
    if sink:  # is one more cell, before the others
        cells, first = (torch.nn.functional.pad(x, (1, 0), value=value) for x, value in ((cells, True), (first, 0)))
        end = torch.cat(((length - 1).clamp(max=sink)[:, None], end), 1)
        room = torch.nn.functional.pad(room, (1, 0), value=sink)
    # How many cells there are, and how much room they need, follows from positions alone: the host knows without asking.
    n_cells = batch * int(count.sum() + (n * heads if sink else 0))
    n_keys = batch * int((count * -(-torch.arange(m - n + 1, m + 1) // columns)).sum() + n * heads * sink)
    listed = TileLists.from_mask(cells)
    cell, row = listed.ids[:n_cells].long(), listed.row_of_ids()[:n_cells] % n
    starts = torch.nn.functional.pad(room[row, cell].cumsum(0), (1, 0))
    source = torch.repeat_interleave(torch.arange(n_cells, device=device), room[row, cell], output_size=n_keys)
    key = first[row, cell][source] + torch.arange(n_keys, device=device) - starts[source]
    return TileLists(starts[listed.offsets], key.to(torch.int32)).only(key < end[row, cell][source])


@functools.lru_cache(maxsize=4)
def _network(found: Calibration, spec: ModelSpec, device: torch.device) -> Network:
    """One copy on the device however many requests are bound."""
    return Network.of(found.tensors, spec, device, found.digest)
