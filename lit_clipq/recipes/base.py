"""What a recipe is: a frozen dataclass that says what, and a registered handler that does it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lit_clipq.calibration.engine import Calibration
from lit_clipq.errors import CalibrationError, ConfigError
from lit_clipq.nn.swap import FLOAT_BITS, Layer, MapEntry, QuantizationMap, select
from lit_clipq.recipes.widths import BitWidths


@dataclass(frozen=True)
class Recipe:
    """Options every recipe has."""

    bits: BitWidths = field(default_factory=BitWidths)
    """Widths of weights and activations, for each tower."""
    include: tuple[str, ...] = ()
    """Shell patterns of layer names to quantize; empty means all."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of layer names to leave float."""
    attention_products: bool = True
    """Whether QK^T and attention x V are quantized as well."""
    embeddings: bool = False
    """Whether token embedding tables are stored as codes; they multiply nothing, but are a sixth of a CLIP."""

    def why_float(self, layer: Layer) -> str:
        """Return why this recipe leaves a layer float, or an empty text where it quantizes it."""
        if layer.kind.name == "matmul" and not self.attention_products:
            return "attention products are off in this recipe"
        if layer.kind.name == "embedding":
            if not self.embeddings:
                return "embedding tables are off in this recipe"
            return "positions stay float" if "position" in layer.name.rpartition(".")[2] else ""
        return ""

    def footprint(self, calibration: Calibration) -> tuple[int, int]:
        """Predict (bytes stored beside the model, passes over the calibration set); by default minima and maxima.

        Raises:
            CalibrationError: If the memory limit is below what is needed.
        """
        needed = sum(_RANGE_BYTES * (1 + (e.weight_bits is None)) for e in calibration.plan.quantized)
        if calibration.memory_limit_bytes is not None and needed > calibration.memory_limit_bytes:
            raise CalibrationError(
                f"calibration needs {needed} bytes beside the model, the limit is {calibration.memory_limit_bytes}; "
                "raise memory_limit_gb"
            )
        return needed, 1


_RANGE_BYTES = 8  # a float32 minimum and maximum
R = TypeVar("R", bound=Recipe)
Handler = Callable[[Any, Calibration], None]
_RECIPES: dict[str, tuple[type[Recipe], Handler]] = {}


def register(name: str, recipe: type[R]) -> Callable[[Callable[[R, Calibration], None]], Callable]:
    """Register a recipe and its handler under the name the command line uses."""

    def add(handler: Callable[[R, Calibration], None]) -> Callable[[R, Calibration], None]:
        _RECIPES[name] = (recipe, handler)
        return handler

    return add


def recipe_names() -> list[str]:
    """Return the registered names, sorted."""
    return sorted(_RECIPES)


def make_recipe(name: str, **options: Any) -> Recipe:
    """Build a recipe by name; options it does not have are refused.

    Raises:
        ConfigError: For an unknown name or option.
    """
    if name not in _RECIPES:
        close = get_close_matches(name, _RECIPES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"unknown recipe {name!r}, expected one of {', '.join(recipe_names())}{hint}")
    recipe = _RECIPES[name][0]
    options = _nested(options)
    unknown = sorted(set(options) - {f.name for f in fields(recipe)})
    if unknown:
        raise ConfigError(f"recipe {name!r} has no option {', '.join(unknown)}; leave it out")
    return _filled(recipe(), options)


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn names with dots, as on a command line, into dictionaries: `search.distance` is `distance` of `search`."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        head, _, rest = name.partition(".")
        if rest and isinstance(found.setdefault(head, {}), Mapping):
            found[head] = {**found[head], rest: value}
        elif isinstance(value, Mapping) and isinstance(found.get(head), Mapping):
            found[head] = {**found[head], **value}
        else:
            found[head] = value
    return {name: _nested(value) if isinstance(value, Mapping) else value for name, value in found.items()}


def _filled(default: Any, options: Mapping[str, Any]) -> Any:
    """Return `default` with options replaced, by dictionaries within options of their own; choices are checked."""
    hints, chosen = get_type_hints(type(default)), {}
    for name, value in options.items():
        if name not in hints:
            raise ConfigError(f"{type(default).__name__} has no option {name}; expected {', '.join(hints)}")
        if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
            raise ConfigError(f"{name} must be one of {', '.join(get_args(hints[name]))}; got {value!r}")
        current = getattr(default, name)
        if is_dataclass(current) and isinstance(value, Mapping):
            chosen[name] = _filled(current, value)
        elif isinstance(current, bool | int | float | str) and not _fits(value, current):
            raise ConfigError(f"{name} must be of type {type(current).__name__}, as {current!r} is; got {value!r}")
        else:
            chosen[name] = value
    return replace(default, **chosen)


def _fits(value: Any, current: Any) -> bool:
    if isinstance(current, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(current)


def name_of(recipe: Recipe) -> str:
    """Return the name a recipe is registered under.

    Raises:
        ConfigError: If its class was never registered.
    """
    for name, (kind, _) in _RECIPES.items():
        if type(recipe) is kind:
            return name
    raise ConfigError(
        f"{type(recipe).__name__} is not a registered recipe; expected one of {', '.join(recipe_names())}"
    )


def handler_of(recipe: Recipe) -> Handler:
    """Return the function that applies `recipe`."""
    return _RECIPES[name_of(recipe)][1]


def plan(recipe: Recipe, layers: list[Layer]) -> QuantizationMap:
    """Decide what becomes of each layer, from widths, patterns and `attention_products`.

    Raises:
        ConfigError: For a pattern that matches no layer.
    """
    left_out = select(layers, recipe.include, recipe.exclude)
    return QuantizationMap(tuple(_entry(recipe, layer, left_out) for layer in layers))


def _entry(recipe: Recipe, layer: Layer, left_out: Mapping[str, str]) -> MapEntry:
    weight_bits, activation_bits = recipe.bits.of(layer.tower)
    if not layer.kind.operands:
        activation_bits = FLOAT_BITS
    has_weight = layer.kind.has_weight
    reason = left_out.get(layer.name, "")
    reason = reason or recipe.why_float(layer)
    if not reason and activation_bits == FLOAT_BITS and (weight_bits == FLOAT_BITS or not has_weight):
        reason = f"{layer.tower} is set to {FLOAT_BITS} bits"
    if reason:
        weight_bits = activation_bits = FLOAT_BITS
    return MapEntry(
        layer.name, layer.tower, layer.kind.name, weight_bits if has_weight else None, activation_bits, reason=reason
    )
