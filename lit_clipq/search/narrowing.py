"""How one layer's candidates are narrowed down: coarse tables on few units first, the last candidates on many.

A layer's product has two operands that are searched together: a weight and its input, or the two sides of a product of
activations. The first one's candidates are compared channel by channel, the second one has one grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_clipq.calibration.observations import Observations
from lit_clipq.nn.layout import MapLayout
from lit_clipq.nn.registry import layout_of
from lit_clipq.search.candidates import Candidates
from lit_clipq.search.losses import ProductLosses
from lit_clipq.search.sampling import Sampler
from lit_clipq.search.selection import around, best_first, spaced, valley

_CHANNELS = 192  # of a weight, evenly spread, that stand for all in the first tables
_SPACING = 8  # of the candidates in them
_SLACK = 1.4  # times the lowest loss: what may still hold the best candidate
_LITTLE = 1.05  # times the lowest loss of a pair: what of the second operand may still hold the best
_LOOKS = 10  # candidates of each operand in the table of both
_NEAR = 3  # candidates to either side that a weight may move by once its input's grid has changed
_FINALISTS = 4  # candidates that are compared on more data


@dataclass
class Problem:
    """What is to be chosen for one layer: a candidate of each operand and channel.

    Attributes:
        data: All units, with targets.
        candidates: Grids of each operand that is quantized.
        losses: Compares them.
        device: Where the ranks exchange.
        chosen: Candidates int64 (channels,) by operand; min-max at the start.
    """

    data: Sequence[Observations]
    candidates: dict[str, Candidates]
    losses: ProductLosses
    device: torch.device
    chosen: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first, self.second = self.losses.names
        self.chosen = {name: family.start for name, family in self.candidates.items()}

    @property
    def searched(self) -> list[str]:
        """Operands with more than one candidate: the weight first."""
        return [name for name, family in self.candidates.items() if family.count > 1]

    def pick(self) -> tuple[Tensor, Tensor]:
        """Return what is chosen of the two operands, (1, channels) each; of one that stays float anything."""
        nothing = torch.zeros(1, dtype=torch.int64, device=self.device)
        first, second = (self.chosen.get(name, nothing)[None] for name in (self.first, self.second))
        return first, second

    def choose(self, name: str, candidate: int) -> None:
        """Choose one candidate for all channels."""
        self.chosen[name] = torch.full_like(self.chosen[name], candidate)

    def alternate(self, rounds: int, reach: int | None = None) -> None:
        """Search one operand after the other on all data: every candidate, or those within reach of the chosen one."""
        for _ in range(rounds):
            for name in self.searched:
                family, chosen = self.candidates[name], self.chosen[name][None]
                if reach is None:
                    everything = torch.arange(family.count, device=chosen.device)[:, None]
                    offers = torch.cat([chosen, everything.expand(-1, family.channels)])
                else:
                    offers = around(chosen, reach, family.count)
                self.chosen[name] = best_first(offers, self.losses_of(name, offers, self.data))[0]

    def follow(self, rough: Sequence[Observations], fine: Sequence[Observations], *, every: bool = False) -> None:
        """Search what families have to be searched next, the second operand's first.

        Args:
            rough: Few units, on which most candidates are given up.
            fine: More of them.
            every: Whether all candidates are compared where few would do.
        """
        for name in (self.second, self.first):
            family, changed = self.candidates.get(name), False
            while family is not None and (family := family.then(self.chosen[name])) is not None:
                self.candidates[name], self.chosen[name] = family, family.start
                if family.steps is None or every:
                    self.screen(name, (0, family.count - 1), rough, fine)
                else:
                    offers = torch.stack([family.start + step for step in family.steps]).clamp(0, family.count - 1)
                    self.chosen[name] = best_first(offers, self.losses_of(name, offers, fine))[0]
                changed = True
            if changed and name == self.second and self.first in self.searched:
                near = around(self.chosen[self.first][None], _NEAR, self.candidates[self.first].count)
                self.chosen[self.first] = best_first(near, self.losses_of(self.first, near, fine))[0]

    def take(self, name: str, family: Candidates, rough: Sequence[Observations], fine: Sequence[Observations]) -> None:
        """Search another family for an operand in the place of the one that it has; see `follow`."""
        self.candidates[name], self.chosen[name] = family, family.start
        self.screen(name, (0, family.count - 1), rough, fine)
        self.follow(rough, fine)

    def screen(
        self, name: str, span: tuple[int, int], rough: Sequence[Observations], fine: Sequence[Observations]
    ) -> None:
        """Choose one operand's candidate, the other's as chosen: the best of a span on few units, then on more."""
        offers = torch.arange(span[0], span[1] + 1, device=self.device)[:, None]
        offers = offers.expand(-1, self.candidates[name].channels)
        offers = best_first(offers, self.losses_of(name, offers, rough))[:_FINALISTS]
        offers = torch.cat([self.chosen[name][None], offers])
        self.chosen[name] = best_first(offers, self.losses_of(name, offers, fine))[0]

    def table(
        self, data: list[Observations], first: Sequence[int] | None, second: Sequence[int] | None, step: int
    ) -> Tensor:
        """Return losses (A, B, channels), on the CPU, of candidates A for all channels and B; `None` is float."""
        columns = [None if x is None else torch.tensor(x, device=self.device)[:, None] for x in (first, second)]
        if columns[0] is not None:
            columns[0] = columns[0].expand(-1, self.candidates[self.first].every(step).channels)
        return self.losses.losses(data, *columns, step=step).cpu()

    def losses_of(self, name: str, offers: Tensor, data: Sequence[Observations]) -> Tensor:
        """Return losses (A, channels) of one operand's offers, the other as chosen."""
        pair = (offers, self.pick()[1]) if name == self.first else (self.pick()[0], offers)
        losses = self.losses.losses(data, *pair, per_channel=name == self.first)
        return losses[:, 0] if name == self.first else losses[0]


@dataclass
class Narrowing:
    """The search from coarse tables on few units to the last candidates on many.

    Attributes:
        problem: What is to be chosen.
        sampler: Draws units.
        errors: Relative standard errors of the objectives that say where to look, that give most candidates up, and
            that compare the last ones.
    """

    problem: Problem
    sampler: Sampler
    errors: tuple[float, float, float]

    def coarse_to_fine(self) -> None:
        """Search from coarse tables on few units to the last candidates on many."""
        coarse, rough, fine = (self.sampler.sample(error) for error in self.errors)
        if len(self.problem.searched) == 1:
            (name,) = self.problem.searched
            self.problem.screen(name, (0, self.problem.candidates[name].count - 1), rough, fine)
        elif self.problem.losses.weight is None:
            for name, span in self.shortlist(coarse, step=1).items():
                self.problem.screen(name, span, rough, fine)
            self.refine_pair(fine)
        else:
            step = max(1, self.problem.candidates[self.problem.first].channels // _CHANNELS) if self._by_rows() else 1
            spans = self.shortlist(coarse, step)
            self.refine_input(spans, rough, step)
            self.problem.screen(self.problem.first, spans[self.problem.first], rough, fine)

    def _by_rows(self) -> bool:
        """Tell, on every rank alike, whether what is drawn are rows, of which every n-th channel can be computed."""
        maps = isinstance(layout_of(self.problem.losses.module), MapLayout)
        return not maps or self.sampler.by_rows(self.errors[1])

    def shortlist(self, data: list[Observations], step: int) -> dict[str, tuple[int, int]]:
        """Choose the pair that is the best of a coarse table; return where to look on.

        Each operand alone, the other in float, tells where its valley is. The objective of a grid of the second one is
        the sum over channels of the minimum over the first one's grids.
        """
        first, second = self.problem.first, self.problem.second
        f_all, s_all = (spaced(0, self.problem.candidates[name].count - 1, _SPACING) for name in (first, second))
        f_span = _between(f_all, valley(self.problem.table(data, f_all, None, step)[:, 0], _SLACK))
        s_span = _between(s_all, valley(self.problem.table(data, None, s_all, step).sum(-1).T, _SLACK))
        f_some, s_some = (spaced(*span, max(1, (span[1] - span[0]) // _LOOKS)) for span in (f_span, s_span))
        losses = self.problem.table(data, f_some, s_some, step)
        paired = losses.amin(0).sum(-1)
        best = int(paired.argmin())
        self.problem.choose(second, s_some[best])
        s_span = _between(s_some, valley(paired[:, None], _LITTLE))
        partners = losses[:, best]
        if self.problem.losses.weight is None:
            self.problem.choose(first, f_some[int(partners.argmin())])
        f_span = _between(f_some, valley(partners, _LITTLE if self.problem.losses.weight is None else _SLACK))
        return {first: f_span, second: s_span}

    def refine_input(self, spans: dict[str, tuple[int, int]], data: list[Observations], step: int) -> None:
        """Choose the grid of a layer's input.

        What a weight that adapts to it makes good is known from every n-th channel, which stands for all; what it costs
        by itself, from all of them.
        """
        offers, partners = spaced(*spans[self.problem.second], 1), spaced(*spans[self.problem.first], 2)
        adapted = self.problem.table(data, partners, offers, step).amin(0).sum(-1)
        exact = self.problem.table(data, None, offers, 1)[0]
        alone, exact = exact[:, ::step].sum(-1), exact.sum(-1)
        stand_for = exact.sum() / alone.sum() if alone.sum() > 0 else 1.0
        estimate = exact + (adapted - alone) * stand_for
        self.problem.choose(self.problem.second, offers[int(estimate.argmin())])

    def refine_pair(self, data: list[Observations]) -> None:
        """Choose among the pairs around the chosen one: the best on drawn units, then on all of them."""
        problem = self.problem
        near = [
            around(problem.chosen[name][None], 2, problem.candidates[name].count).unique(dim=0)
            for name in problem.searched
        ]
        losses = problem.losses.losses(data, *near)[..., 0]
        pairs = losses.flatten().argsort(stable=True)[:_FINALISTS]
        firsts, seconds = near[0][pairs // losses.shape[1]], near[1][pairs % losses.shape[1]]
        everything = problem.data
        exact = [problem.losses.losses(everything, f[None], s[None]) for f, s in zip(firsts, seconds, strict=True)]
        best = torch.cat(exact).flatten().argmin()
        problem.chosen = {problem.first: firsts[best], problem.second: seconds[best]}


def _between(candidates: Sequence[int], places: tuple[int, int]) -> tuple[int, int]:
    return candidates[places[0]], candidates[places[1]]
