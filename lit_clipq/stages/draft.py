"""One quantized network in the making: what becomes of each layer, and what was changed around them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_clipq.calibration.channels import Channels, SeenChannels
from lit_clipq.calibration.links import Sample, SeenLinks
from lit_clipq.calibration.results import LayerResult
from lit_clipq.calibration.scaling import ChannelScaling, LayerScaling, by_layer, scale_in_place, scaled
from lit_clipq.calibration.session import Session
from lit_clipq.errors import CalibrationError, ModelError
from lit_clipq.nn.modules import QLinear, QModule, QWeighted
from lit_clipq.nn.structure import compensate, uncompensate
from lit_clipq.nn.swap import QuantizationMap, swap, unswap
from lit_clipq.stages.stage import Stage

S = TypeVar("S", bound=Stage)


@dataclass
class Draft:
    """One quantized network in the making. The float network stays as it is until `install`.

    Attributes:
        session: The calibration that it is made from, which others may share.
        plan: What is to become of each layer.
        stages: The recipe's stages, in order.
        modules: Q-modules by name.
        scalings: Channels that are divided where they are made and multiplied where they are read.
        changes: What else is done to the float network, with what takes it back, in order.
        structure: What the network has besides, to be replayed when it is loaded; see `lit_clipq.nn.structure`.
        results: How the search of each layer went.
        reports: What each stage says of itself.
        attached: Linear layers beside blocks, by the block's name.
        installed: Whether the network is the quantized one now.
        scaling: What scaled channels mean for each layer.
    """

    session: Session
    plan: QuantizationMap
    stages: tuple[Stage, ...]
    modules: dict[str, QModule] = field(default_factory=dict)
    scalings: list[ChannelScaling] = field(default_factory=list)
    changes: list[tuple[Callable[[], None], Callable[[], None]]] = field(default_factory=list)
    structure: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, LayerResult] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    attached: dict[str, nn.Linear] = field(default_factory=dict)
    installed: bool = False
    scaling: dict[str, LayerScaling] = field(default_factory=dict)
    _unscale: Callable[[], None] | None = None

    def stage(self, kind: type[S]) -> S:
        """Return the recipe's stage of a kind; there must be one."""
        return next(stage for stage in self.stages if isinstance(stage, kind))

    # What the network shows, with the scaled channels of this draft

    @property
    def channels(self) -> SeenChannels:
        """Links of channels, and what their readers read."""
        seen = self.session.channels
        return SeenChannels(seen.links, self._scaled(seen.channels))

    @property
    def links(self) -> SeenLinks:
        """Links of every kind, what their readers read, and a sample of it."""
        seen = self.session.links
        samples = dict(seen.samples)
        for name, scaling in self.scaling.items():
            if scaling.read is not None and name in samples:
                units = samples[name].units
                shape = (1, -1, *[1] * (units.dim() - 2))
                samples[name] = Sample(samples[name].keys, units / scaling.read.to(units).view(shape))
        return SeenLinks(seen.links, self._scaled(seen.channels), samples)

    def _scaled(self, channels: Mapping[str, Channels]) -> dict[str, Channels]:
        changed = dict(channels)
        for name, scaling in self.scaling.items():
            if scaling.read is not None and name in changed:
                c, f = changed[name], scaling.read
                changed[name] = Channels(c.low / f, c.high / f, c.squares / f.square(), c.rows)
        return changed

    def start(self, name: str) -> Tensor | None:
        """Return the start token's key or value in a product of the text tower; `None` if no text was seen."""
        value = self.session.starts.get(name)
        return value if value is None or name not in self.scaling else self.scaling[name].constant(value)

    def parameters(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the float weight and bias that a layer has in this draft, detached."""
        module = self.session.layer[name].module
        weight, bias = module.get_parameter("weight").detach(), module._parameters.get("bias")
        scaling = self.scaling.get(name)
        if scaling is None:
            return weight, None if bias is None else bias.detach()
        return scaling.parameters(weight, bias)

    # What stages do to it

    def change(self, do: Callable[[], None], undo: Callable[[], None]) -> None:
        """Change the float network in place, now and whenever this draft is installed."""
        self.changes.append((do, undo))  # first, so that what an interrupt leaves half done is taken back
        do()

    def replace(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Give a module of the float network another parameter of the old one's type and place, as `change` does."""
        old = module.get_parameter(name)
        new = nn.Parameter(value.detach().to(old), requires_grad=old.requires_grad)
        self.change(partial(_set, module, name, new), partial(_set, module, name, old))

    def add_parameter(self, module: nn.Module, name: str, value: Tensor, entry: Mapping[str, Any]) -> None:
        """Give a module of the float network a parameter that it lacks; `entry` replays that when it is loaded."""
        like = next(module.parameters())
        new = nn.Parameter(value.detach().to(like), requires_grad=like.requires_grad)
        self.change(partial(_set, module, name, new), partial(_set, module, name, None))
        self.structure.append(dict(entry))

    def scale(self, scalings: list[ChannelScaling]) -> None:
        """Take over channels that are scaled, on top of those that are already."""
        known = {scaling.link: scaling for scaling in self.scalings}
        for new in scalings:
            old = known.get(new.link)
            known[new.link] = new if old is None else ChannelScaling(new.link, old.factors * new.factors)
        self.scalings = list(known.values())
        self.scaling = by_layer(self.scalings)

    def add(self, name: str, module: QModule) -> None:
        """Put a Q-module in the place of a layer; it takes the weight and bias of this draft."""
        if isinstance(module, QWeighted) and name in self.scaling:
            weight, bias = self.parameters(name)
            old = module.weight, module.bias
            module.weight = nn.Parameter(weight, requires_grad=old[0].requires_grad)
            module.bias = None if bias is None or old[1] is None else nn.Parameter(bias, old[1].requires_grad)
            divisor = self.scaling[name].divides
            if divisor is not None and isinstance(module, QLinear):
                module.input_divisor = divisor.to(weight)
        self.modules[name] = module

    def variant(self, plan: QuantizationMap) -> "Draft":
        """Return a draft of other widths that shares the network, its scaled channels and float weights with this one.

        It has no Q-modules yet, and is not to be installed.
        """
        return Draft(self.session, plan, self.stages, scalings=self.scalings, scaling=self.scaling)

    def share_parameters(self, other: "Draft") -> None:
        """Take over the weights and biases of another draft's layers, so that they are held once."""
        for name, module in self.modules.items():
            shared = other.modules[name]
            if isinstance(module, QWeighted) and isinstance(shared, QWeighted):
                module.weight, module.bias = shared.weight, shared.bias

    def attach(self, block: str, linear: nn.Linear) -> None:
        """Let a block return its output plus a linear layer of its input, wherever this draft is in place."""
        self.attached[block] = linear

    # Its place in the network

    def install(self) -> None:
        """Make the network the quantized one.

        Raises:
            ModelError: If another form of the network is in place.
        """
        if not self.installed:
            self._check_float()
            for do, _ in self.changes:
                do()
            self._place()
            self.installed = True

    def remove(self) -> None:
        """Make the network the float one again, to the bit."""
        if self.installed:
            self._displace()
            for _, undo in reversed(self.changes):
                undo()
            self.installed = False

    def undo_changes(self) -> None:
        """Take back what was changed in place, until `install`."""
        if not self.installed:
            for _, undo in reversed(self.changes):
                undo()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network be that of this draft, its Q-modules in whatever phase, while the context is open."""
        self._place()
        try:
            yield
        finally:
            self._displace()

    @contextmanager
    def scaled_in_place(self) -> Iterator[None]:
        """Let the channels of the float network be scaled while the context is open."""
        with scaled(self.session.modules, self.scalings):
            yield

    def changes_weights(self, name: str) -> bool:
        """Whether a stage before the layers are visited gave a layer another float weight or bias than this draft's."""
        module = self.modules[name]
        if not isinstance(module, QWeighted) or name in self.scaling:
            return False
        weight, bias = self.parameters(name)
        same_bias = (bias is None) == (module.bias is None) and (
            bias is None or module.bias is None or bias.data_ptr() == module.bias.data_ptr()
        )
        return weight.data_ptr() != module.weight.data_ptr() or not same_bias

    def _check_float(self) -> None:
        """Make sure that every layer stands where it stood when the calibration began."""
        now = {f"{root}.{n}": m for root, net in self.session.roots.items() for n, m in net.named_modules()}
        other = next((name for name in self.modules if now.get(name) is not self.session.layer[name].module), None)
        if other is not None:
            raise ModelError(
                f"expected the float network, but {other} is another layer than when it was calibrated; remove the "
                "form that is in place before this one is installed"
            )

    def _place(self) -> None:
        self._unscale = scale_in_place(self._around, self.scalings)
        layers = [self.session.layer[name] for name in self.modules]
        swap(self.session.roots, layers, lambda layer: self.modules[layer.name])
        for block, linear in self.attached.items():
            compensate(self.session.modules[block], linear)

    def _displace(self) -> None:
        for block in self.attached:
            uncompensate(self.session.modules[block])
        unswap(self.session.roots, self.session.layers, self.modules)
        if self._unscale is not None:
            self._unscale()
            self._unscale = None

    @property
    def _around(self) -> Mapping[str, nn.Module]:
        """The modules that stay in the network."""
        return {name: module for name, module in self.session.modules.items() if name not in self.modules}


def _set(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
    module._parameters[name] = value


@torch.no_grad()
def frozen(module: QModule, name: str) -> QModule:
    """Freeze a Q-module, if it is not yet.

    Raises:
        CalibrationError: If no stage gave one of its grids a scale.
    """
    if not module.is_frozen:
        lacking = [q for q in module.quantizers if q is not None and not q.calibrated]
        if lacking:
            raise CalibrationError(
                f"no stage gave the {type(lacking[0]).__name__} of layer {name} its scale; add `search` or `ranges` to "
                "the stages"
            )
        module.freeze()
    return module
