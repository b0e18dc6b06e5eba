"""Time, memory and quality of the calibration of PTQ4CLIP: `python -m benchmarks.calibration`.

Two parts, on random weights:

- `blocks`: the search of whole transformer blocks against the procedure of the paper written out plainly (one forward
  and backward pass of the block for each layer, all 100 candidates, three rounds, the same objective). The claim: at
  least 50 times faster, no layer more than 1 % worse at 8, 6 and 4 bits. The oracle takes minutes.
- `whole`: both towers of a CLIP on pairs of pictures and captions. The claim for ViT-B-32 with 32 pairs: at most 60 s
  and 5 GB on two cores; on a GPU with 128 pairs at most 3 s, ViT-L-14 at most 12 s.

Pairs are those of Flickr8k below `$LIT_CLIPQ_DATA/flickr8k` (default ../shared/data), else synthetic ones.
"""

import argparse
import copy
import csv
import logging
import os
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import lit_clipq
from lit_clipq.calibration.observations import Observations
from lit_clipq.calibration.passes import CalibrationSet, look
from lit_clipq.calibration.recorder import Recorder, Watched
from lit_clipq.functional.granularity import PerChannel
from lit_clipq.models import LoadedCLIP, encode_image, make_explicit
from lit_clipq.nn.matmul import MatMul
from lit_clipq.nn.modules import QLinear, QMatMul, QModule
from lit_clipq.nn.quantizer import Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from lit_clipq.nn.registry import layout_of
from lit_clipq.recipes import BitWidths, make_recipe
from lit_clipq.search.data import LayerData
from lit_clipq.search.layer import LayerSearch, SearchOptions
from lit_clipq.search.selection import linear_multipliers

QUICKGELU_MINIMUM = -0.16361
CANDIDATES, ROUNDS = 100, 3
REPEATS = 3  # of our search, which takes seconds, before the oracle and again after it; the median counts


def pairs(loaded: LoadedCLIP, count: int) -> tuple[tuple[Tensor, Tensor], str]:
    """Return (pictures, texts) and where they come from."""
    root = (
        Path(os.environ.get("LIT_CLIPQ_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "flickr8k"
    )
    captions: dict[str, str] = {}
    if (root / "captions.txt").is_file():
        with open(root / "captions.txt", newline="") as file:
            for row in csv.DictReader(file):
                captions.setdefault(row["image"], row["caption"])
    if len(captions) < count:
        generator = torch.Generator().manual_seed(0)
        size = loaded.preprocessing.image(Image.new("RGB", (32, 32))).shape
        texts = [f"a photo of {i} dogs that play in the snow" + " beside a red car" * (i % 3) for i in range(count)]
        return (torch.randn(count, *size, generator=generator), loaded.preprocessing.tokenizer(texts)), "synthetic"
    names = list(captions)[:count]
    pictures = torch.stack([loaded.preprocessing.image(Image.open(root / "images" / name)) for name in names])
    return (pictures, loaded.preprocessing.tokenizer([captions[name] for name in names])), "flickr8k"


# ---------------------------------------------------------------- blocks


@dataclass
class Block:
    """A block of the image tower, with what enters it and the gradient of the objective by what leaves it."""

    module: nn.Module
    entering: Tensor
    gradient: Tensor

    def observe(self, modules: dict[str, QModule]) -> dict[str, list[Observations]]:
        """One forward and one backward pass, back to the first layer that is recorded: what the layers saw."""
        recorder = Recorder({name: Watched(module, layout_of(module)) for name, module in modules.items()})
        look(
            CalibrationSet([self.entering], self.module),
            [recorder],
            cotangents=lambda *_: {"output": self.gradient[None]},
            roots=[self.module],
        )
        return recorder.seen


def blocks_of(loaded: LoadedCLIP, images: Tensor, numbers: Sequence[int]) -> dict[int, Block]:
    """Run the image tower once and cut blocks out of it."""
    model = copy.deepcopy(loaded.model).eval().requires_grad_(False)
    make_explicit(model)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    layers = model.visual.transformer.resblocks

    def keep(number: int):  # noqa: ANN202 - a hook
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_().clone()
            output.retain_grad()
            seen[number] = (inputs[0].detach(), output)
            return output

        return hook

    handles = [layers[number].register_forward_hook(keep(number)) for number in numbers]
    embedding = F.normalize(encode_image(model, images), dim=-1)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, embedding.shape, generator=generator) * 2.0 - 1
    embedding.backward(signs / embedding.shape[1] ** 0.5)
    for handle in handles:
        handle.remove()
    return {n: Block(layers[n], entering, output.grad) for n, (entering, output) in seen.items()}  # type: ignore[arg-type]


def swap_block(block: nn.Module, bits: int) -> dict[str, QModule]:
    """Put Q-modules with empty grids in the place of the six products; returns them by name."""
    swapped: dict[str, QModule] = {}
    for name, module in list(block.named_modules()):
        replacement: QModule | None = None
        if isinstance(module, MatMul):
            left: Quantizer = UniformQuantizer(bits, symmetric=False)
            if name.endswith("av"):
                left = TwinSoftmaxQuantizer(bits)
            replacement = QMatMul(module, left, UniformQuantizer(bits, symmetric=False))
        elif isinstance(module, nn.Linear):
            operand: Quantizer = UniformQuantizer(bits, symmetric=False)
            if name.endswith("c_proj"):
                operand = TwinGeluQuantizer(bits, QUICKGELU_MINIMUM)
            weight = UniformQuantizer(bits, symmetric=True, granularity=PerChannel(0))
            replacement = QLinear(module, weight, operand)
        if replacement is not None:
            parent, _, key = name.rpartition(".")
            setattr(block.get_submodule(parent), key, replacement)
            swapped[name] = replacement
    return swapped


def ours(block: Block, bits: int) -> tuple[dict[str, QModule], float]:
    """Search one block: one pass, then layer by layer; returns the layers and seconds."""
    modules = swap_block(block.module, bits)
    started = time.perf_counter()
    seen = block.observe(modules)
    for name, module in modules.items():
        LayerSearch(LayerData(name, module, seen.pop(name), block.entering.device), SearchOptions()).run()
    return modules, time.perf_counter() - started


@dataclass
class PlainLayer:
    """One layer of the paper's procedure: what it saw, and its grids as plain numbers."""

    kind: str
    bits: int
    inputs: tuple[Tensor, ...]
    squares: Tensor
    weight: Tensor | None
    target: Tensor
    grids: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of what is searched, in order."""
        return ("weight", "input") if self.weight is not None else ("a", "b")

    def value(self, operand: str) -> Tensor:
        """The float operand."""
        if operand == "weight" and self.weight is not None:
            return self.weight
        return self.inputs[1 if operand == "b" else 0]

    def grid(self, operand: str, index: int) -> tuple[Tensor, ...]:
        """Parameters of candidate `index`: (scale, zero), (split,) or (positive step,)."""
        x, top = self.value(operand), 2**self.bits - 1
        factor = linear_multipliers(CANDIDATES)[index]
        if operand == "weight":
            return (2 * x.abs().amax(1, keepdim=True) / top * factor, torch.zeros(()))
        if self.kind == "av" and operand == "a":
            return (torch.exp2(torch.linspace(-12, 0, CANDIDATES))[index],)
        if self.kind == "c_proj":
            return (x.max() / (2 ** (self.bits - 1) - 1) * factor,)
        scale = (x.max().clamp(min=0) - x.min().clamp(max=0)) / top
        return (scale * factor, (-x.min().clamp(max=0) / scale).round())

    def rounded(self, operand: str, grid: tuple[Tensor, ...]) -> Tensor:
        """The operand on a grid."""
        x, n = self.value(operand), 2 ** (self.bits - 1)
        if operand == "weight":
            return (x / grid[0]).round().clamp(-n, n - 1) * grid[0]
        if self.kind == "av" and operand == "a":
            low = (x * (n - 1) / grid[0]).round().clamp(0, n - 1) * grid[0] / (n - 1)
            return torch.where(x < grid[0], low, (x * (n - 1)).round().clamp(0, n - 1) / (n - 1))
        if self.kind == "c_proj":
            step = -QUICKGELU_MINIMUM / n
            return (x / step).round().clamp(-n, 0) * step + (x / grid[0]).round().clamp(0, n - 1) * grid[0]
        scale, zero = grid
        return ((x / scale).round() + zero).clamp(0, 2 * n - 1).sub(zero) * scale

    def loss(self, rounded: dict[str, Tensor]) -> Tensor:
        """Weighted squared error of each output channel."""
        output = rounded["a"] @ rounded["b"] if self.weight is None else F.linear(rounded["input"], rounded["weight"])
        return ((output - self.target) ** 2 * self.squares).flatten(0, -2).sum(0)

    def search(self) -> None:
        """Three rounds over both operands, every candidate on all data."""
        self.grids = {operand: self.grid(operand, 82) for operand in self.operands}
        for _ in range(ROUNDS):
            for operand in self.operands:
                rounded = {name: self.rounded(name, self.grids[name]) for name in self.operands}
                best = torch.full((1,), torch.inf)
                for index in range(CANDIDATES):
                    grid = self.grid(operand, index)
                    loss = self.loss(rounded | {operand: self.rounded(operand, grid)})
                    if operand == "weight":
                        better = loss < best
                        scale = torch.where(better[:, None], grid[0], self.grids[operand][0])
                        self.grids[operand] = (scale, grid[1])
                        best = torch.where(better, loss, best)
                    elif loss.sum() < best:
                        best, self.grids[operand] = loss.sum(), grid

    def objective(self) -> float:
        """The final objective, summed in float64."""
        return float(self.loss({n: self.rounded(n, self.grids[n]) for n in self.operands}).double().sum())


def plain(block: Block, name: str, module: QModule, bits: int) -> PlainLayer:
    """One pass of the block for one layer."""
    (seen,) = block.observe({name: module})[name]
    weight = module.weight.detach() if isinstance(module, QLinear) else None
    return plain_layer(name, seen, weight, bits)


def plain_layer(name: str, seen: Observations, weight: Tensor | None, bits: int) -> PlainLayer:
    """Take a layer's observations over; the squared gradients of one with a weight are factored, as in our search."""
    squares = cast(Tensor, seen.weight)
    if weight is not None:
        squares = squares.mean(1, keepdim=True) * squares.mean(0) / squares.mean()
    target = seen.inputs[0] @ seen.inputs[1] if weight is None else F.linear(seen.inputs[0], weight)
    kind = name.rpartition(".")[2]
    return PlainLayer(kind, bits, seen.inputs, squares, weight, target)


def grids_of(module: QModule) -> dict[str, tuple[Tensor, ...]]:
    """Return the grids that our search found in the oracle's form."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, quantizer in {"weight": getattr(module, "weight_quantizer", None), **module.operand_quantizers}.items():
        if isinstance(quantizer, UniformQuantizer):
            scale = quantizer._need("scale")
            found[name] = (scale[:, None] if scale.dim() else scale, quantizer._need("zero_point"))
        elif isinstance(quantizer, TwinSoftmaxQuantizer):
            found[name] = (quantizer._need("split"),)
        elif isinstance(quantizer, TwinGeluQuantizer):
            found[name] = (quantizer._need("positive_step"),)
    return found


def copied(block: Block) -> Block:
    """Return the same block with a module of its own."""
    return Block(copy.deepcopy(block.module), block.entering, block.gradient)


def compare_blocks(model: str, count: int, numbers: Sequence[int], widths: Sequence[int]) -> None:
    """Print seconds, their ratio and the difference of the objective of every layer."""
    loaded = lit_clipq.load_clip(model)
    (images, _), source = pairs(loaded, 2 * count)
    images, others = images.split(count)
    print(f"blocks {list(numbers)} of {model}'s image tower, {len(images)} pictures ({source}), {_machine()}")
    held_out = blocks_of(loaded, others, numbers)
    for number, block in blocks_of(loaded, images, numbers).items():
        for bits in widths:
            theirs_block = copied(block)
            other_block = Block(copy.deepcopy(block.module), held_out[number].entering, held_out[number].gradient)
            others_modules = swap_block(other_block.module, bits)
            searched = [ours(copied(block), bits) for _ in range(REPEATS)]
            modules = searched[0][0]
            their_seconds, differences, elsewhere = 0.0, {}, {}
            for name, module in swap_block(theirs_block.module, bits).items():
                started = time.perf_counter()
                layer = plain(theirs_block, name, module, bits)
                with torch.no_grad():
                    layer.search()
                    their_seconds += time.perf_counter() - started
                    with_others = plain(other_block, name, others_modules[name], bits)
                    differences[name] = relative(layer, layer.grids, grids_of(modules[name]))
                    elsewhere[name] = relative(with_others, layer.grids, grids_of(modules[name]))
            searched += [ours(copied(block), bits) for _ in range(REPEATS)]
            our_seconds = statistics.median(seconds for _, seconds in searched)
            worst = max(differences, key=lambda name: differences[name])
            print(
                f"block {number}, {bits} bits: oracle {their_seconds:7.1f} s, ours {our_seconds:5.2f} s, ratio "
                f"{their_seconds / our_seconds:5.1f}; worst layer {worst} {differences[worst]:+.2%}, mean "
                f"{sum(differences.values()) / len(differences):+.2%}; on {len(others)} other pictures worst "
                f"{max(elsewhere.values()):+.2%}, mean {sum(elsewhere.values()) / len(elsewhere):+.2%}"
            )
            values = (f"{name} {value:+.2%} ({elsewhere[name]:+.2%})" for name, value in differences.items())
            print("  " + ", ".join(values), flush=True)


def relative(layer: PlainLayer, theirs: dict[str, tuple[Tensor, ...]], ours: dict[str, tuple[Tensor, ...]]) -> float:
    """Return by how much the objective of our grids is larger than that of theirs."""
    layer.grids = theirs
    objective = layer.objective()
    layer.grids = ours
    result = layer.objective() / objective - 1
    layer.grids = theirs
    return result


# ---------------------------------------------------------------- whole


def calibrate_whole(
    model: str,
    count: int,
    batch: int,
    bits: int,
    recipe: str,
    device: str,
    memory_limit_gb: float | None,
    repeat: int,
    compare: bool,
) -> None:
    """Print seconds and peak memory, and whether the scales without a memory limit are the same."""
    loaded = lit_clipq.load_clip(model)
    (images, texts), source = pairs(loaded, count)
    batches = list(zip(images.to(device).split(batch), texts.to(device).split(batch), strict=True))
    print(f"{model}, {count} pairs ({source}), {bits} bits, {recipe}, {_machine(device)}")
    scales: list[dict[str, Tensor]] = []
    for limit in [memory_limit_gb] * repeat + [None] * compare:
        network = copy.deepcopy(loaded.model).to(device)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        started, before = time.perf_counter(), _peak_bytes(device)
        report = lit_clipq.quantize(
            network,
            batches,
            make_recipe(recipe, bits=BitWidths.resolve({"bits": bits})),
            memory_limit_bytes=None if limit is None else int(limit * 1e9),
        )
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        print(
            f"  limit {limit or 'none'}: {len(report.layers)} layers in {report.passes} passes, {seconds:.1f} s; "
            f"peak {_peak_bytes(device) / 1e9:.2f} GB ({before / 1e9:.2f} GB before), "
            f"predicted beside the model {report.memory_bytes / 1e9:.2f} GB",
            flush=True,
        )
        state = network.state_dict().items()
        scales.append({name: value for name, value in state if name.endswith(("scale", "split", "positive_step"))})
        del network
    if compare:
        same = all(torch.equal(value, scales[-1][name]) for name, value in scales[0].items())
        print(f"  scales with and without the limit are {'bit-identical' if same else 'DIFFERENT'}")


def _peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _machine(device: str = "cpu") -> str:
    name = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}"


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "blocks", "whole"), default="all")
    parser.add_argument("--model", default="ViT-B-32-quickgelu", help="open_clip model name")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="pairs in a calibration batch")
    parser.add_argument("--blocks", type=int, nargs="+", default=[5], help="blocks of the image tower")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4], help="widths; `whole` takes the first")
    parser.add_argument("--recipe", default="ptq4clip")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-limit-gb", type=float, help="memory limit of `whole`")
    parser.add_argument("--compare", action="store_true", help="`whole` also runs without the limit; compares scales")
    parser.add_argument("--repeat", type=int, default=1, help="runs of `whole`; on a GPU the first one warms up")
    parser.add_argument("--verbose", action="store_true", help="log every layer")
    options = parser.parse_args(args)
    torch.manual_seed(0)  # of the weights
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    if options.part in ("all", "whole"):
        calibrate_whole(
            options.model,
            options.pairs,
            options.batch,
            options.bits[0],
            options.recipe,
            options.device,
            options.memory_limit_gb,
            options.repeat,
            options.compare,
        )
    if options.part in ("all", "blocks"):
        compare_blocks(options.model, options.pairs, options.blocks, options.bits)


if __name__ == "__main__":
    main()
