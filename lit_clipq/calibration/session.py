"""One calibration: the float networks, their layers, the batches, and what was seen of them.

A session serves what stages need. What is asked for together is collected in one pass; it is kept until a stage writes
something upstream of it, and nobody writes to it, so that several recipes can read the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_clipq.calibration.budget import Budget, Storage
from lit_clipq.calibration.channels import ChannelObserver, SeenChannels
from lit_clipq.calibration.links import LinkObserver, SeenLinks
from lit_clipq.calibration.needs import SPOILS, Need, Write
from lit_clipq.calibration.objective import check_gradients, fisher_cotangents, gauss_newton_cotangents
from lit_clipq.calibration.observations import Observations, joined
from lit_clipq.calibration.passes import CalibrationSet, Cotangents, EmbeddingObserver, Observer, OutputObserver, look
from lit_clipq.calibration.ranges import RangeObserver, Ranges
from lit_clipq.calibration.recorder import Recorder, Watched
from lit_clipq.calibration.sources import SourceObserver, Sources
from lit_clipq.calibration.start import StartObserver
from lit_clipq.functional.granularity import Granularity
from lit_clipq.nn.swap import Layer, QuantizationMap


@dataclass(frozen=True)
class Collection:
    """What is collected of the calibration set, and what of it counts."""

    objective: Literal["fisher", "gauss_newton"] = "gauss_newton"
    """Whose squared gradients weigh errors."""
    draws: int = 1
    """How many draws the squared gradients of a sample are averaged over."""
    temperature: float = 0.1
    """Of the image-text softmax, for the Fisher objective."""
    seed: int = 0
    """Of the draws."""
    end_token: bool = True
    """Whether positions behind a text's end are left out."""
    drop_start: bool = False
    """Whether the first position of texts is left out."""
    token_share: float = 1.0
    """Share of the rows of linear layers that is kept."""
    store_bfloat16: bool = False
    """Whether operands and gradients are stored in bfloat16."""
    values: bool = True
    """Whether the values of attentions count as channels."""

    def storage(self, *, gradients: bool) -> Storage:
        """Return how observations are kept."""
        return Storage(2 if self.store_bfloat16 else 4, gradients=gradients, token_share=self.token_share)


@dataclass
class Session:
    """One calibration of one set of networks.

    Attributes:
        roots: Named networks in float.
        layers: Their quantizable layers.
        data: The batches and how to run them.
        budget: What observations take.
        collection: What is collected.
        text_rule: Whether the text tower is causal and pooled at its end token.
        passes: How often the whole set ran.
    """

    roots: Mapping[str, nn.Module]
    layers: Sequence[Layer]
    data: CalibrationSet
    budget: Budget
    collection: Collection = field(default_factory=Collection)
    text_rule: bool = False
    passes: int = 0
    _known: dict[Need, Any] = field(default_factory=dict)
    _gradients: Cotangents | None = None

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next((p.device for root in self.roots.values() for p in root.parameters()), torch.device("cpu"))

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module of the float networks by its name."""
        return {f"{root}.{name}": m for root, network in self.roots.items() for name, m in network.named_modules()}

    @cached_property
    def text_layers(self) -> frozenset[str]:
        """Names of the layers whose rows are positions of a text under the end-token rule."""
        return frozenset(layer.name for layer in self.layers if layer.tower == "text" and self.text_rule)

    @cached_property
    def layer(self) -> dict[str, Layer]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    # What stages ask for

    @property
    def sources(self) -> Sources:
        """What stands in front of each layer."""
        return self._get(Need.SOURCES)  # type: ignore[no-any-return]

    @property
    def channels(self) -> SeenChannels:
        """Links of channels, and what their readers read."""
        return self._get(Need.CHANNELS)  # type: ignore[no-any-return]

    @property
    def links(self) -> SeenLinks:
        """Links of every kind, and what their readers read."""
        return self._get(Need.LINKS)  # type: ignore[no-any-return]

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs that matter of one batch of each kind, when they were last looked at."""
        return self._get(Need.OUTPUTS)  # type: ignore[no-any-return]

    @property
    def starts(self) -> dict[str, Tensor]:
        """What the text tower's products see of the first position of their right operand, by name."""
        return self._get(Need.START)  # type: ignore[no-any-return]

    def prepare(self, needs: Iterable[Need]) -> None:
        """Collect in one pass what of the needs is not known; what belongs to single layers comes with their visit."""
        missing = {need for need in needs if need not in self._known and not need.by_layer} - {Need.RANGES}
        if Need.START in missing and Need.SOURCES not in self._known:
            self.prepare({*missing, Need.SOURCES} - {Need.START})  # says which product averages values
            missing = {Need.START}
        observers = {need: self._observer(need) for need in sorted(missing, key=lambda need: need.name)}
        if observers:
            self.run(list(observers.values()))
            for need, observer in observers.items():
                self._known[need] = _found(observer)

    def wrote(self, writes: Iterable[Write]) -> None:
        """End the validity of what was seen downstream of a change in the networks."""
        for need in {need for write in writes for need in SPOILS[write]}:
            self._known.pop(need, None)
        self.__dict__.pop("modules", None)

    def run(self, observers: Sequence[Observer], cotangents: Cotangents | None = None) -> None:
        """Run the set once with the rows of this session's collection; see `passes.look`."""
        self.passes += any(observer.whole_set for observer in observers)
        look(
            self.data,
            observers,
            cotangents=cotangents,
            roots=() if cotangents is None else self.roots.values(),
            end_token=self.collection.end_token,
            drop_start=self.collection.drop_start,
        )

    def outputs_now(self) -> list[Tensor]:
        """Return the outputs that matter of one batch of each kind, of the networks as they are at this moment."""
        observer = OutputObserver()
        self.run([observer])
        return observer.outputs

    def ranges(
        self,
        operands: Mapping[str, Mapping[tuple[int, str], Granularity]],
        modules: Mapping[str, nn.Module] | None = None,
    ) -> Ranges:
        """Return the ranges of operands over all ranks; see `RangeObserver`."""
        observer = RangeObserver(self.watched(list(operands), modules), operands)
        self.run([observer])
        return observer.merged()

    def observe(
        self, names: Sequence[str], *, gradients: bool, modules: Mapping[str, nn.Module] | None = None
    ) -> dict[str, list[Observations]]:
        """Run the set once and return what the named layers saw, joined as far as shapes allow.

        Args:
            names: Layers.
            gradients: Whether squared output gradients are collected.
            modules: What stands in the network in the place of float layers; by default these.

        Raises:
            CalibrationError: If gradients are zero or not finite.
        """
        recorder = Recorder(
            self.watched(names, modules),
            gradients=gradients,
            dtype=torch.bfloat16 if self.collection.store_bfloat16 else None,
            token_share=self.collection.token_share,
        )
        self.run([recorder], self.cotangents() if gradients else None)
        if gradients:
            check_gradients(names, recorder.seen)
        return {name: joined(recorder.seen.pop(name, [])) for name in names}

    def watched(self, names: Sequence[str], modules: Mapping[str, nn.Module] | None = None) -> dict[str, Watched]:
        """Return the named layers as observers take them."""
        averages = self.sources.averages
        found = {}
        for name in names:
            layer = self.layer[name]
            module = layer.module if modules is None else modules[name]
            text = name in self.text_layers
            found[name] = Watched(module, layer.kind.layout(layer.module), text=text, averages=name in averages)
        return found

    def cotangents(self) -> Cotangents:
        """Return what is back-propagated; for the Fisher objective the whole set is embedded first."""
        if self._gradients is None:
            c = self.collection
            if c.objective == "gauss_newton":
                self._gradients = gauss_newton_cotangents(c.seed, c.draws)
            else:
                observer = EmbeddingObserver()
                self.run([observer])
                self._gradients = fisher_cotangents(observer.numbers, observer.outputs, c.temperature, c.seed, c.draws)
        return self._gradients

    def searched(self, plan: QuantizationMap) -> list[str]:
        """Return the products that a plan quantizes and a calibration batch reaches, in order of the network."""
        cost = self.budget.cost
        return [e.name for e in plan.quantized if cost.macs.get(e.name) and e.name in cost.input_elements]

    def _get(self, need: Need) -> Any:
        self.prepare([need])
        return self._known[need]

    def _observer(self, need: Need) -> "SourceObserver | ChannelObserver | OutputObserver | StartObserver":
        if need is Need.SOURCES:
            return SourceObserver(self.roots, self.layers)
        if need is Need.CHANNELS:
            return ChannelObserver(self.modules, self.layers, self.text_layers, values=self.collection.values)
        if need is Need.LINKS:
            return LinkObserver(self.modules, self.layers, self.text_layers, values=self.collection.values)
        if need is Need.OUTPUTS:
            return OutputObserver()
        text = (layer for layer in self.layers if layer.name in self.text_layers)
        products = [layer for layer in text if layer.kind.is_product_of_activations]
        return StartObserver(products, self.sources.averages, self.device)


def _found(observer: SourceObserver | ChannelObserver | OutputObserver | StartObserver) -> Any:
    return observer.outputs if isinstance(observer, OutputObserver) else observer.found()
