"""Registers for vision towers: keys and values of the tokens that outliers sit in, as a prefix of later attentions.

After RegCache (arXiv 2510.04547). From some block on a few tokens of every picture carry huge values and are attended
to by all others, which need somewhere to put attention that is to do nothing. Offered constants to attend to, they need
the outliers less. This changes the float function: where and how many registers there are is searched on the
calibration set, none at all among the candidates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.calibration.passes import Observer
from lit_clipq.distributed import gather
from lit_clipq.errors import ConfigError
from lit_clipq.functional.granularity import extrema
from lit_clipq.models.attention.openclip import ExplicitMultihead, ExplicitOpenClip
from lit_clipq.models.attention.timm import ExplicitTimm
from lit_clipq.models.residual import ResidualStream, residual_streams
from lit_clipq.nn.attention import ExplicitAttention
from lit_clipq.nn.quantizer import UniformQuantizer
from lit_clipq.nn.swap import FLOAT_BITS, MapEntry, QuantizationMap
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.grids import Grids
from lit_clipq.stages.stage import FloatStage, Report, stage

REASON = "what registers add to scores and averages is float"


@dataclass(frozen=True)
class Prefix:
    """Registers of one attention: keys (1, H, d, r) and values (1, H, r, d)."""

    keys: Tensor
    values: Tensor


@stage("registers")
@dataclass(frozen=True)
class Registers(FloatStage):
    """Give the attentions of a vision tower registers from some block on: key and value of its largest tokens.

    The i-th register is the mean, over calibration pictures, of key and value of the token with the i-th largest
    magnitude at that block's input. Block and count are those with the least squared error of the float outputs,
    were every layer of the tower rounded by min-max grids of the recipe's widths. On pictures that took no part in the
    choice that must be less than without registers, or there are none. The tokens themselves stay: tasks read them.
    """

    needs = frozenset({Need.OUTPUTS})
    writes = frozenset({Write.STRUCTURE, Write.WEIGHTS})
    forbids = frozenset({"equalize", "smooth"})
    passes = 1

    counts: tuple[int, ...] = (1, 2, 4)
    """How many registers are tried: the first number at every block, the others at the best of these."""
    blocks: tuple[int, ...] = ()
    """From which blocks on they are tried, counted from 0; by default from each."""

    def __post_init__(self) -> None:
        if any(not 0 < count <= 64 for count in self.counts):
            raise ConfigError(f"counts of registers must be at least 1 and at most 64, got {list(self.counts)}")
        if any(block < 0 for block in self.blocks):
            raise ConfigError(f"blocks of registers must be at least 0, got {list(self.blocks)}")

    def check_networks(self, plan: QuantizationMap, roots: Mapping[str, nn.Module]) -> None:
        """Refuse blocks that the vision tower has not."""
        count, most = len(_blocks(roots, plan)), max(self.blocks, default=0)
        if count and most >= count:
            raise ConfigError(
                f"blocks of registers names block {most}, but the vision tower has {count}, counted from 0; give "
                f"numbers up to {count - 1}"
            )

    @torch.no_grad()
    def rewrite(self, draft: Draft) -> Report:
        """Give the vision tower of a draft its registers.

        Returns:
            Block and count, errors on held out pictures before and after, and the cosine of the float outputs with
            and without; or the reason why there are none.
        """
        blocks = _blocks(draft.session.roots, draft.plan)
        if not blocks:
            return {"count": 0, "reason": "no vision tower with a residual stream between LayerNorms is quantized"}
        if not self.counts:
            return {"count": 0, "reason": "no count is offered"}
        observer = TokenObserver(blocks, max(self.counts))
        draft.session.run([observer])
        found = observer.found()
        if found is None:
            return {"count": 0, "reason": "no picture was seen"}
        trial = _Trial(draft)
        none = trial.errors({})
        names = list(blocks)
        starts = self.blocks or range(len(names))
        best, (_, after) = self._search(trial, starts, lambda at: _prefixes(found, names[at[0] :], *at))
        before = none[1]
        if not before > 0:
            return {"count": 0, "reason": "no picture to be judged on"}
        if not after < before:
            return {"count": 0, "reason": "none is better on pictures held out", "before": before, "after": before}
        for name, prefix in _prefixes(found, names[best[0] :], *best).items():
            self._give(draft, name, blocks[name].attention, prefix)
        return {
            "block": names[best[0]],
            "count": min(best[1], found[names[best[0]]][best[0]].keys.shape[-1]),
            "before": before,
            "after": after,
            "float outputs": {"cosine": trial.cosine()},
        }

    def _search(
        self, trial: "_Trial", starts: Sequence[int], prefixes: Callable[[tuple[int, int]], Mapping[str, Prefix]]
    ) -> tuple[tuple[int, int], tuple[float, float]]:
        """Return the best block and count with its errors: first the block, then how many from there on."""
        errors: dict[tuple[int, int], tuple[float, float]] = {}
        for block in starts:
            errors[block, self.counts[0]] = trial.errors(prefixes((block, self.counts[0])))
        block = gather(min(errors, key=lambda at: errors[at][0]))[0][0]
        for count in self.counts[1:]:
            errors[block, count] = trial.errors(prefixes((block, count)))
        best = gather(min(errors, key=lambda at: errors[at][0]))[0]
        return best, errors[best]

    @staticmethod
    def _give(draft: Draft, name: str, attention: ExplicitAttention, prefix: Prefix) -> None:
        """Put the registers of one attention in place, and enter what they cost into the map."""
        heads, size, count = prefix.keys.shape[1:]
        macs = draft.session.budget.cost.macs.get(f"{name}.qk", 0.0)  # of L queries with L keys: H d L^2
        length = (macs / (heads * size)) ** 0.5
        rows = []
        for part, key, value in (("qk", "prefix_keys", prefix.keys), ("av", "prefix_values", prefix.values)):
            buffers = attention._modules[part]._buffers  # type: ignore[union-attr]
            draft.change(partial(buffers.__setitem__, key, value), partial(buffers.__setitem__, key, None))
            cost = heads * value.shape[-1 if part == "av" else -2] * count * length
            rows.append(
                MapEntry(f"{name}.{part}.registers", "vision", "registers", None, FLOAT_BITS, cost, reason=REASON)
            )
        draft.plan = QuantizationMap((*draft.plan.entries, *rows))


_KNOWN = (ExplicitMultihead, ExplicitOpenClip, ExplicitTimm)


@dataclass(frozen=True)
class Block:
    """A block of the tower: its attention, and the normalisation in front of it, which reads the residual stream."""

    attention: ExplicitAttention
    norm: nn.Module


def _blocks(roots: Mapping[str, nn.Module], plan: QuantizationMap) -> dict[str, Block]:
    """Return the blocks of the vision tower by the name of their attention, in order, if the tower is quantized."""
    clip = roots.get("clip")
    if clip is None or not any(entry.tower == "vision" for entry in plan.quantized):
        return {}
    stream = dict(residual_streams(clip)).get("vision")
    if not isinstance(stream, ResidualStream):
        return {}
    norms: dict[Any, nn.Module] = {reader: norm for norm, readers in stream.readers for reader in readers}
    return {
        f"clip.{name}": Block(module, norms[module.qkv_proj])
        for name, module in clip.named_modules()
        if isinstance(module, _KNOWN) and module._modules.get("qkv_proj") in norms
    }


def _prefixes(found: Mapping[str, Mapping[int, Prefix]], names: list[str], start: int, count: int) -> dict[str, Prefix]:
    return {
        name: Prefix(p.keys[..., :count], p.values[..., :count, :]) for name in names for p in (found[name][start],)
    }


class TokenObserver(Observer):
    """Averages key and value of the largest tokens at each block's input, in every block from there on.

    Args:
        blocks: Attentions by name, in order.
        count: How many tokens of a picture are looked at.
    """

    whole_set = True

    def __init__(self, blocks: Mapping[str, Block], count: int) -> None:
        self.blocks, self.count = blocks, count
        self._places: list[Tensor] = []
        self._keys: dict[str, Tensor] = {}
        self._sums: dict[tuple[str, int], tuple[Any, Any, int]] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook what reads the residual stream in front of each attention, and the attention's products."""
        for name, block in self.blocks.items():
            yield block.norm.register_forward_pre_hook(self._entered)
            yield block.attention.qk.register_forward_pre_hook(self._seen_keys(name))
            yield block.attention.av.register_forward_pre_hook(self._seen_values(name))

    def end(self, outputs: Any) -> None:  # noqa: ARG002
        """Forget the tokens of this batch."""
        self._places.clear()

    def _entered(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]  # (B, L, D)
        self._places.append(x.abs().amax(-1).topk(min(self.count, x.shape[1]), dim=1).indices)

    def _seen_keys(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._keys[name] = inputs[1]  # (B, H, d, L)

        return hook

    def _seen_values(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            keys, values = self._keys.pop(name).transpose(-2, -1), inputs[1]  # (B, H, L, d)
            for start, places in enumerate(self._places):
                at = places[:, None, :, None]
                k, v = (
                    x.take_along_dim(at.expand(-1, x.shape[1], -1, x.shape[-1]), dim=2).sum(0, dtype=torch.float64)
                    for x in (keys, values)
                )
                old_k, old_v, count = self._sums.get((name, start), (0, 0, 0))
                self._sums[name, start] = old_k + k, old_v + v, count + len(values)

        return hook

    def found(self) -> dict[str, dict[int, Prefix]] | None:
        """Return the registers of each attention by the block they start from, over all ranks; a collective call."""
        everyone = gather({key: (k.cpu(), v.cpu(), count) for key, (k, v, count) in self._sums.items()})
        result: dict[str, dict[int, Prefix]] = {name: {} for name in self.blocks}
        for name, start in sorted({key for sums in everyone for key in sums}):
            like = self.blocks[name].attention.qkv_proj.get_parameter("weight")
            parts: list[Any] = [sums[name, start] for sums in everyone if (name, start) in sums]
            count = sum(part[2] for part in parts)
            keys, values = (torch.stack([part[i] for part in parts]).sum(0) / count for i in (0, 1))  # (H, r, d)
            result[name][start] = Prefix(keys.transpose(-2, -1)[None].to(like), values[None].to(like))
        return result if any(result.values()) else None


@dataclass
class _Trial:
    """Squared error of the outputs that matter, were the vision tower rounded by min-max grids."""

    draft: Draft
    expected: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.expected = self.draft.session.outputs

    def errors(self, prefixes: Mapping[str, Prefix]) -> tuple[float, float]:
        """Return the error on three quarters of the samples of a batch, and on the rest."""
        modules = self.draft.session.modules
        with ExitStack() as stack:
            for name, prefix in prefixes.items():
                stack.enter_context(_with_prefix(modules[f"{name}.qk"], modules[f"{name}.av"], prefix))
            stack.enter_context(self._rounded())
            outputs = self.draft.session.outputs_now()
        sums = torch.zeros(2, dtype=torch.float64)
        for x, y in zip(self.expected, outputs, strict=True):
            each = (x - y).double().square().flatten(1).sum(1).cpu()
            held_out = torch.arange(len(each)) % 4 == 3
            sums += torch.stack([each[~held_out].sum(), each[held_out].sum()])
        total = torch.stack(list(gather(sums))).sum(0)
        return float(total[0]), float(total[1])

    def cosine(self) -> float:
        """Return the mean cosine of the float outputs with those seen before."""
        now = self.draft.session.outputs_now()
        pairs = zip(self.expected, now, strict=True)
        each = [F.cosine_similarity(x.double().flatten(1), y.double().flatten(1)).cpu() for x, y in pairs]
        everyone = torch.cat([x for own in gather(each) for x in own])
        return float(everyone.mean())

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        """Let the vision tower's layers read rounded inputs and weights while the context is open."""
        draft = self.draft
        with ExitStack() as stack:
            for entry in draft.plan.quantized:
                layer = draft.session.layer[entry.name]
                if entry.tower != "vision" or layer.kind.is_table:
                    continue
                quantizers = draft.stage(Grids).quantizers(layer, entry, draft)
                weight_quantizer = quantizers.pop(0) if layer.kind.has_weight else None
                if isinstance(weight_quantizer, UniformQuantizer):
                    stack.enter_context(_rounded_weight(layer.module, weight_quantizer))
                if entry.activation_bits != FLOAT_BITS:
                    hook = _rounds_inputs(entry.activation_bits)
                    stack.callback(layer.module.register_forward_pre_hook(hook).remove)
            yield


@contextmanager
def _with_prefix(qk: nn.Module, av: nn.Module, prefix: Prefix) -> Iterator[None]:
    """Give two float products their registers while the context is open."""
    qk._buffers["prefix_keys"], av._buffers["prefix_values"] = prefix.keys, prefix.values
    try:
        yield
    finally:
        qk._buffers["prefix_keys"] = av._buffers["prefix_values"] = None


@contextmanager
def _rounded_weight(layer: nn.Module, quantizer: UniformQuantizer) -> Iterator[None]:
    """Let a layer hold its rounded weight while the context is open."""
    weight = layer.get_parameter("weight")
    old = weight.data
    quantizer.set_range(*extrema(old, quantizer.granularity))
    weight.data = quantizer(old)
    try:
        yield
    finally:
        weight.data = old


def _rounds_inputs(bits: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return a hook that rounds inputs by affine grids that span what it sees; registers' weights stay float."""

    def rounded(x: Tensor) -> Tensor:
        quantizer = UniformQuantizer(bits, symmetric=False)
        quantizer.set_range(*extrema(x, quantizer.granularity))
        return quantizer(x)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = module._buffers.get("prefix_values")
        if values is None:
            return tuple(rounded(x) for x in inputs)
        count, (a, b) = values.shape[-2], inputs
        return torch.cat([a[..., :count], rounded(a[..., count:])], dim=-1), rounded(b)

    return hook
