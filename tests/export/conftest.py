"""Mini models, quantized and exported once for all tests."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from lit_clipq import load_clip, quantize
from lit_clipq.export import ExportOptions, ExportReport, Samples, embeddings, export_clip
from lit_clipq.models import LoadedCLIP
from lit_clipq.recipes import make_recipe
from lit_clipq.recipes.widths import BitWidths


@dataclass(frozen=True)
class Exported:
    loaded: LoadedCLIP
    samples: Samples
    report: ExportReport


def make(name: str, recipe: str, folder: Path, widths: dict[str, int] | None = None, **options: object) -> Exported:
    fallback = str(options.pop("fallback", "refuse"))
    loaded = load_clip(name, "mini")
    samples = Samples.make(loaded.preprocessing)
    reference = embeddings(loaded, samples)
    chosen = make_recipe(recipe, bits=BitWidths.resolve(widths or {}, None), **options)
    quantize(loaded.model, [(samples.images[:4], samples.tokens[:4])], chosen)
    target = ExportOptions(str(folder), fallback=fallback)
    report = export_clip(loaded, target, about={"recipe": chosen.to_json()}, reference=reference, samples=samples)
    return Exported(loaded, samples, report)


@pytest.fixture(scope="session")
def twin(tmp_path_factory) -> Exported:
    """The mini ViT with twin grids, every product and the token table."""
    return make("mini-vit", "ptq4clip", tmp_path_factory.mktemp("twin") / "export")
