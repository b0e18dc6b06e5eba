"""Artefacts of format version 1, which named Python classes and had the options of recipes in one place."""

from collections.abc import Mapping
from typing import Any

from lit_clipq.recipes import BitWidths, make_recipe

_MODULES = {
    "QLinear": "linear",
    "QConv2d": "conv2d",
    "QMatMul": "matmul",
    "QEmbedding": "embedding",
    "StartTokenScores": "start_token_scores",
    "StartTokenAverage": "start_token_average",
}
_QUANTIZERS = {
    "UniformQuantizer": "uniform",
    "TwinSoftmaxQuantizer": "twin_softmax",
    "TwinGeluQuantizer": "twin_gelu",
    "LogQuantizer": "log",
}
_GRANULARITIES = {
    "PerTensor": "per_tensor",
    "PerChannel": "per_channel",
    "PerToken": "per_token",
    "PerGroup": "per_group",
}


def upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON of a version 1 artefact as version 2 has it.

    Raises:
        ConfigError: For a recipe or an option that this version has not.
    """
    options = dict(content["recipe"]["options"])
    bits = BitWidths(**options.pop("bits"))
    recipe = make_recipe(content["recipe"]["name"], bits=bits, **options)
    modules = {name: _module(config) for name, config in content["modules"].items()}
    reports = {"equalize": content["equalized"]} if content.get("equalized") else {}
    return {**content, "recipe": recipe.to_json(), "modules": modules, "structure": [], "stages": reports}


def _module(config: Mapping[str, Any]) -> dict[str, Any]:
    quantizers = [q and _quantizer(q) for q in config["quantizers"]]
    return {**config, "type": _MODULES.get(config["type"], config["type"]), "quantizers": quantizers}


def _quantizer(config: Mapping[str, Any]) -> dict[str, Any]:
    new = {**config, "type": _QUANTIZERS.get(config["type"], config["type"])}
    if "granularity" in new:
        name, *arguments = new["granularity"]
        new["granularity"] = [_GRANULARITIES.get(name, name), *arguments]
    return new
