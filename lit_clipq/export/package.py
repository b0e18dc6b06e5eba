"""Export a quantized CLIP: both towers as ONNX, proved equal to the fake-quantized network, in one folder."""

import importlib.metadata
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import lit_clipq
from lit_clipq.errors import ConfigError
from lit_clipq.export.folder import check_target, new_folder, write_content
from lit_clipq.export.inputs import image_transform, write_tokenizer
from lit_clipq.export.options import ExportOptions
from lit_clipq.export.parity import OpenSession, TowerParity, compare_products, sqnr
from lit_clipq.export.products import Form, form_of
from lit_clipq.export.samples import Reference, Samples, embeddings
from lit_clipq.export.towers import ImageTower, TextTower, towers_of
from lit_clipq.models import LoadedCLIP
from lit_clipq.nn.integer import NotExportable
from lit_clipq.nn.modules import Phase, QModule, QWeighted
from lit_clipq.runtime.folder import PREPROCESS_FILE, TOKENIZER_FILE, TOWER_FILES
from lit_clipq.runtime.session import open_session

ROOT = "clip"
_PACKAGES = ("torch", "open_clip_torch", "onnx", "onnxruntime", "tokenizers")
_SAFE = (-64, 63)
"""Codes of weights whose pair sums never leave 16 bits."""


@dataclass(frozen=True)
class ExportReport:
    """What an export did."""

    path: Path
    parity: Mapping[str, TowerParity]
    """By tower, `image` and `text`."""
    kernels: Mapping[str, Mapping[str, int]]
    """By tower: how often each kernel multiplies a layer."""
    kept_float: Mapping[str, str]
    """Layers that were kept float, with the reason."""
    bytes: Mapping[str, int]
    """Sizes of the files."""


def export_clip(
    loaded: LoadedCLIP,
    options: ExportOptions,
    *,
    about: Mapping[str, Any] | None = None,
    reference: Reference | None = None,
    samples: Samples | None = None,
    open_: OpenSession = open_session,
) -> ExportReport:
    """Export a quantized CLIP.

    Args:
        loaded: A quantized CLIP in float32 on the CPU, as `load_quantized` returns it.
        options: Where and how.
        about: Further plain values for `export.json`, such as the recipe.
        reference: Embeddings of the float network on the samples; without them the network with float activations takes
            its place.
        samples: What parity is shown on; by default scenes of the mini world.
        open_: Makes the sessions that parity is checked in.

    Returns:
        What was written.

    Raises:
        ConfigError: A layer that cannot be exported, a missing package, or a target that cannot be written.
        ModelError: If the exported graph does not compute what the network does; nothing is left behind.
    """
    check_target(options.path, force=options.force)
    fallback = options.fallback == "float"
    forms = _forms(loaded.model, fallback=fallback)
    samples = samples or Samples.make(loaded.preprocessing)
    towers = towers_of(loaded)
    with new_folder(options.path) as folder:
        written = {name: _write(tower, forms, folder / TOWER_FILES[name], fallback) for name, tower in towers.items()}
        kernels = {name: kernels for name, (_, kernels) in written.items()}
        kept = {name: form.reason for name, form in forms.items() if form.fallback}
        with _kept_float(forms):
            fake = embeddings(loaded, samples)
            reference = reference or _float_activations(loaded, samples, forms)
            parity = {}
            for name, tower in towers.items():
                products = compare_products(tower, samples.of(name), written[name][0], forms, open_)
                session = open_((folder / TOWER_FILES[name]).read_bytes())
                integer = session.run(None, {tower.port: samples.of(name).numpy()})[0]
                parity[name] = TowerParity(products, sqnr(integer, fake[name]), sqnr(fake[name], reference[name]))
                parity[name].check(name)
        content = _content(loaded, towers, parity, kernels, kept, forms)
        transform = json.dumps(vars(image_transform(loaded)), indent=1)
        (folder / PREPROCESS_FILE).write_text(transform + "\n", encoding="utf-8")
        content["tokenizer"] = write_tokenizer(loaded, folder / TOKENIZER_FILE)
        content["embedding_size"] = int(fake["text"].shape[1])
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        write_content(folder, {**content, **(about or {})})
    return ExportReport(options.path, parity, kernels, kept, sizes)


def _forms(model: nn.Module, *, fallback: bool) -> dict[str, Form]:
    """Return the form of every quantized layer, by its name in the map.

    Raises:
        ConfigError: Nothing is quantized, or a layer has no integer form and must not stay float.
    """
    forms, refused = {}, []
    for name, layer in model.named_modules():
        if not isinstance(layer, QModule) or layer.phase is not Phase.QUANTIZED:
            continue
        try:
            forms[f"{ROOT}.{name}"] = form_of(layer)
        except NotExportable as error:
            try:
                kept = form_of(layer, fallback=True) if fallback else None
            except NotExportable:
                kept = None  # not even in float
            if kept is None:
                refused.append((f"{ROOT}.{name}", error))
                continue
            kept.reason = str(error)
            forms[f"{ROOT}.{name}"] = kept
    if refused:
        name, first = refused[0]
        others = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
        raise ConfigError(
            f"layer {name}{others} cannot be exported: {first.reason}; {first.advice}, or keep what cannot be exported "
            "float with --export.fallback float"
        )
    if not forms:
        raise ConfigError("expected a quantized network to export; quantize it first (--quantize.recipe)")
    return forms


@contextmanager
def _kept_float(forms: Mapping[str, Form]) -> Iterator[None]:
    """Let layers that stay float be float in the network as well, for the comparison."""
    layers = [form.layer for form in forms.values() if form.fallback]
    for layer in layers:
        layer.phase = Phase.FLOAT
    try:
        yield
    finally:
        for layer in layers:
            layer.phase = Phase.QUANTIZED


def _float_activations(loaded: LoadedCLIP, samples: Samples, forms: Mapping[str, Form]) -> Reference:
    """Embed samples with decoded weights and float activations: what is left of the float network in an artefact."""
    layers = [form.layer for form in forms.values() if form.layer.phase is Phase.QUANTIZED]
    for layer in layers:
        layer.phase = Phase.FLOAT
    try:
        return embeddings(loaded, samples)
    finally:
        for layer in layers:
            layer.phase = Phase.QUANTIZED


def _write_tower(tower: ImageTower | TextTower, forms: Mapping[str, Form], file: Path) -> Any:
    import onnx

    from lit_clipq.export import operators  # noqa: F401 - registers them
    from lit_clipq.export.trace import Tracer

    tracer = Tracer(forms)
    inputs, outputs = tracer.run(tower, tower.example(), tower.port, tower.free, tower.output)
    onnx.save(tracer.graph.model(inputs, outputs), str(file))
    onnx.checker.check_model(str(file))
    return tracer.graph


def _write(
    tower: ImageTower | TextTower, forms: Mapping[str, Form], file: Path, fallback: bool
) -> tuple[Any, dict[str, int]]:
    """Write a tower; returns its graph, and how often each kernel multiplies a layer.

    Where it is allowed, layers for which the runtime has no integer kernel become float, and the tower is written anew.
    """
    from lit_clipq.export.kernels import check_kernels

    while True:
        graph = _write_tower(tower, forms, file)
        kernels = _kernels(file, graph, forms)
        wrong = [kernel for kernel in kernels if not kernel.holds]
        if not (wrong and fallback):
            check_kernels(kernels)
            return graph, dict(sorted(Counter(kernel.operator or "Gather" for kernel in kernels).items()))
        for kernel in wrong:
            forms[kernel.layer].fallback = True
            forms[kernel.layer].reason = f"the runtime has no integer kernel for it here ({kernel.operator})"


def _kernels(file: Path, graph: Any, forms: Mapping[str, Form]) -> list[Any]:
    """List the kernels of a tower's layers."""
    from lit_clipq.export.kernels import list_kernels

    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        optimised = Path(folder) / "optimised.onnx"
        open_session(file, optimised=optimised)
        return list_kernels(optimised, graph.products, {name: form.is_integer for name, form in forms.items()})


def _content(
    loaded: LoadedCLIP,
    towers: Mapping[str, ImageTower | TextTower],
    parity: Mapping[str, TowerParity],
    kernels: Mapping[str, Mapping[str, int]],
    kept: Mapping[str, str],
    forms: Mapping[str, Form],
) -> dict[str, Any]:
    model: Any = loaded.model
    text: Any = towers["text"]
    bias = getattr(model, "logit_bias", None)
    return {
        "versions": {"lit-clipq": lit_clipq.__version__, **{name: _version(name) for name in _PACKAGES}},
        "model": {"name": loaded.name, "pretrained": loaded.pretrained},
        "logit_scale": float(model.logit_scale.detach()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "towers": {
            "image": {"kernels": dict(kernels["image"]), "parity": parity["image"].to_json()},
            "text": {
                "free_length": text.tower is not None,
                "end_token": None if text.tower is None else text.tower.eos_id,
                "kernels": dict(kernels["text"]),
                "parity": parity["text"].to_json(),
            },
        },
        "kept_float": dict(kept),
        "saturates_without_exact_mode": any(_saturable(form.layer) for form in forms.values() if form.is_integer),
    }


def _saturable(layer: QModule) -> bool:
    """Whether pair sums of this layer may leave 16 bits: two activations, or weights of 8 bits."""
    if not isinstance(layer, QWeighted):
        return False  # both operands are unsigned bytes, for which kernels do not saturate
    codes = layer.weight_codes
    return codes is not None and bool((codes.min() < _SAFE[0]) | (codes.max() > _SAFE[1]))


def _version(name: str) -> str:
    return importlib.metadata.version(name)


def told(report: ExportReport) -> str:
    """Tell what an export did, in a few lines."""
    lines = []
    for name, parity in report.parity.items():
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in report.kernels[name].items())
        lines.append(
            f"{name} tower: {kernels}; {report.bytes[TOWER_FILES[name]] / 1e6:.1f} MB; SQNR to the fake-quantized "
            f"embeddings {parity.integer_db:.1f} dB (fake-quantized to float {parity.fake_db:.1f} dB), products from "
            f"{parity.worst[1]:.1f} dB"
        )
    lines += [f"kept float: {name} ({reason})" for name, reason in report.kept_float.items()]
    return "\n".join([*lines, f"exported to {report.path}"])


def export_artefact(path: Path | str, options: ExportOptions, *, samples: Samples | None = None) -> ExportReport:
    """Export a model that `save_quantized` kept.

    Its float weights are gone: what quantization changes is measured against decoded weights, float activations.

    Args:
        path: Folder of the artefact.
        options: Where and how.
        samples: As for `export_clip`.

    Raises:
        ConfigError: See `export_clip`.
        ModelError: See `export_clip`; also for a damaged artefact, or one of another version.
    """
    from lit_clipq.checkpoint import load_quantized, read_artefact

    check_target(options.path, force=options.force)
    artefact = read_artefact(path)
    about = {"recipe": artefact.recipe.to_json(), "reference": "decoded weights, float activations"}
    return export_clip(load_quantized(path), options, about=about, samples=samples)
