"""From names and plain values (YAML, flags, an artefact) to recipes. Types and choices are checked by pydantic."""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar, get_type_hints

from lit_clipq.calibration.needs import Need
from lit_clipq.errors import ConfigError
from lit_clipq.recipes.presets import PRESETS
from lit_clipq.recipes.recipe import Recipe
from lit_clipq.recipes.widths import BitWidths
from lit_clipq.stages import STAGES, Stage
from lit_clipq.stages.bias_correction import BiasCorrection
from lit_clipq.stages.equalize import Equalize
from lit_clipq.stages.recorded import Recorded
from lit_clipq.stages.schedule import asked
from lit_clipq.stages.start_tokens import StartTokens

T = TypeVar("T")

OF_STAGES = {
    "softmax_grid": ("grids", "softmax"),
    "gelu_grid": ("grids", "gelu"),
    "per_channel": ("grids", "per_channel"),
    "restricted": ("grids", "restricted"),
}
"""Options of a recipe that are those of one of its stages: name to (stage, option)."""
OF_SEARCHES = {"objective", "draws", "temperature", "seed", "propagate", "store_bfloat16", "token_share"}
"""Options of a recipe without effect where none of its stages looks at operands."""
SWITCHES: dict[str, type[Stage]] = {"equalize": Equalize, "start_token": StartTokens, "bias_correction": BiasCorrection}
"""Options of a recipe that say whether it has a stage."""


def recipe_names() -> list[str]:
    """Return the names of the recipes, sorted."""
    return sorted(PRESETS)


def make_recipe(name: str, /, **options: Any) -> Recipe:
    """Return a recipe by name, with options changed.

    Args:
        name: One of `recipe_names`.
        **options: Fields of `Recipe`; a stage's name with a dictionary of its options; `equalize`, `start_token` and
            `bias_correction`, whether there is such a stage; `softmax_grid`, `gelu_grid`, `per_channel`, `restricted`,
            which are those of `grids`; `sequential`, another name of `propagate: layer`. Dots go into dictionaries:
            `search.distance` is `distance` of `search`.

    Raises:
        ConfigError: For an unknown name or option, or a value that an option does not take.

    Example:
        >>> recipe = make_recipe("ptq4clip", search={"distance": "l2"}, equalize=False)
        >>> [stage.name for stage in recipe.stages]
        ['grids', 'start_tokens', 'search']
    """
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"unknown recipe {name!r}, expected one of {', '.join(recipe_names())}{hint}")
    return _changed(PRESETS[name](), options)


def compose(stages: Sequence[Stage | str | Mapping[str, Any]], **options: Any) -> Recipe:
    """Return a recipe of stages given in place.

    Causal text towers keep their start token (`start_tokens`, behind the grids) unless `start_token` is false.

    Args:
        stages: Stages, their names, or `{name: options}`; the name of one's own is that of its class, with its module.
        **options: As for `make_recipe`.

    Raises:
        ConfigError: For an unknown stage or option, or an order that cannot be run.

    Example:
        >>> compose([{"equalize": {}}, {"grids": {"softmax": "twin", "gelu": "twin"}}, "search"]).name
        'equalize+grids+search'
    """
    if isinstance(stages, str | Mapping) or not isinstance(stages, Sequence):
        raise ConfigError(f"stages must be a list such as [{{grids: {{}}}}, {{search: {{}}}}], got {stages!r}")
    made = tuple(make_stage(entry) for entry in stages)
    recipe = Recipe("+".join(stage.name for stage in made), made)
    return _changed(recipe, {"start_token": True, **options})


def make_stage(entry: Stage | str | Mapping[str, Any]) -> Stage:
    """Return one stage of its name and options.

    Raises:
        ConfigError: For an unknown stage, option or value.

    Example:
        >>> make_stage({"search": {"distance": "l2"}}).distance
        'l2'
    """
    if isinstance(entry, Stage):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(f"expected a stage as {{name: options}}, got {entry!r}")
    ((name, options),) = entry.items()
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"the options of stage {name} must be a dictionary, got {options!r}")
    return checked(stage_class(str(name)), options or {}, f"stage {name}")


def stage_class(name: str) -> type[Stage]:
    """Return the class of a stage by its name, or by the path of a class of one's own (`module.Class`).

    Raises:
        ConfigError: If there is none.
    """
    if "." in name:
        module, _, kind = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), kind)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ConfigError(f"stage {name} cannot be imported ({error}); give module.Class on the path") from error
        if not (isinstance(found, type) and issubclass(found, Stage)):
            raise ConfigError(f"expected a class of a stage, but {name} is none; derive it from a stage of lit_clipq")
        if STAGES.get(getattr(found, "name", "")) is not found:
            raise ConfigError(f"the class {name} is not registered as a stage; decorate it with `@stage(NAME)`")
        return found
    if name not in STAGES:
        close = get_close_matches(name, STAGES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"unknown stage {name!r}, expected one of {', '.join(sorted(STAGES))}{hint}")
    return STAGES[name]


def checked(kind: type[T], options: Mapping[str, Any], what: str, names: Mapping[str, str] | None = None) -> T:
    """Build a dataclass from plain values of the right types; names, types and choices are checked.

    Args:
        kind: The dataclass.
        options: By field; nested dataclasses as dictionaries.
        what: How errors call it.
        names: What errors call a field, where that is not its name.

    Raises:
        ConfigError: Names the option, what it takes and what it got.
    """
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(f"{what} has no option {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}")
    return _validated(kind, dict(options), what, names or {})


def recipe_from_json(content: Mapping[str, Any]) -> Recipe:
    """Undo `Recipe.to_json`.

    A stage of an unknown name, as of a class of one's own that was not imported, is kept as a record: the recipe says
    what was done, it is not run again.

    Raises:
        ConfigError: For options that this version does not know, or values that they do not take.
    """
    named = [next(iter(entry.items())) for entry in content["stages"]]
    stages = tuple(make_stage({n: o}) if n in STAGES else Recorded(n, json.dumps(o)) for n, o in named)
    return Recipe(str(content["name"]), stages, **_own_fields(content["options"], "the recipe"))


def _validated(kind: Any, value: Any, what: str, names: Mapping[str, str]) -> Any:
    from pydantic import ValidationError

    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the options of {what} must be plain values ({error}), got {value!r}") from error
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(_in_words(error.errors()[0], what, names)) from error


@lru_cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _in_words(error: Mapping[str, Any], what: str, names: Mapping[str, str]) -> str:
    first, *rest = [str(part) for part in error["loc"]] or [""]
    name = ".".join(part for part in (names.get(first, first), *rest) if part)
    if error["type"] == "literal_error":
        choices = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "")
        return f"{name or what} must be one of {choices}; got {error['input']!r}"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{what} has no option {name}; leave it out"
    told = f"{error['msg'][:1].lower()}{error['msg'][1:]}"
    return f"{f'{name} of ' if name else ''}{what}: {told}; got {json.dumps(error['input'])}"


def _changed(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """Return a recipe with options changed; each goes where it belongs."""
    own: dict[str, Any] = {}
    of_stages: dict[str, dict[str, Any]] = {}
    aliases: dict[str, dict[str, str]] = {}
    stages = list(recipe.stages)
    known = {f.name for f in fields(Recipe)} - {"name", "stages"}
    for name, value in _as_tree(options).items():
        if name in OF_STAGES:
            stage, option = OF_STAGES[name]
            of_stages.setdefault(stage, {})[option] = value
            aliases.setdefault(stage, {})[option] = name
        elif name in SWITCHES and not isinstance(value, Mapping):
            stages = _switched(stages, SWITCHES[name], _validated(bool, value, name, {}))
        elif name in STAGES and isinstance(value, Mapping):
            of_stages.setdefault(name, {}).update(value)
        elif name == "sequential" and "propagate" in options:
            raise ConfigError("sequential is another name of `propagate: layer`; give one of the two")
        elif name == "sequential":
            own["propagate"] = "layer" if _validated(bool, value, name, {}) else "none"
        elif name in known:
            own[name] = value
        elif name in STAGES:
            raise ConfigError(f"{name} takes its options as a dictionary, got {value!r}; give {name}.OPTION")
        else:
            raise ConfigError(f"recipe {recipe.name!r} has no option {name}; leave it out")
    searched = {name for name in own if name in OF_SEARCHES}
    if searched and Need.OPERANDS not in asked(stages):
        raise ConfigError(
            f"recipe {recipe.name!r} has no option {', '.join(sorted(searched))}: none of its stages looks at operands"
        )
    for name, changes in of_stages.items():
        place = next((i for i, stage in enumerate(stages) if stage.name == name), None)
        if place is None:
            raise ConfigError(
                f"recipe {recipe.name!r} has no option {', '.join(aliases.get(name, changes))}: it has no stage {name}"
            )
        kind = type(stages[place])
        plain = asdict(stages[place])  # type: ignore[call-overload]
        stages[place] = checked(kind, _merged(plain, changes), kind.__name__, aliases.get(name))
    return replace(recipe, stages=tuple(stages), **_own_fields(own, f"recipe {recipe.name!r}"))


def _own_fields(own: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Check the values of a recipe's own fields."""
    hints, checked_fields = get_type_hints(Recipe), {}
    for name, value in own.items():
        if name not in hints or name in ("name", "stages"):
            raise ConfigError(f"{what} has no option {name}; leave it out")
        if name in ("include", "exclude") and isinstance(value, str):
            value = [value]
        given = isinstance(value, BitWidths)
        checked_fields[name] = value if given else _validated(hints[name], value, name, {})
    return checked_fields


def _switched(stages: Sequence[Stage], kind: type[Stage], on: bool) -> list[Stage]:
    """Return the stages with or without one of a kind; a new one comes behind the others of its scope."""
    others = [stage for stage in stages if not isinstance(stage, kind)]
    if not on:
        return others
    if len(others) < len(stages):
        return list(stages)
    place = next((i for i, stage in enumerate(others) if stage.scope > kind.scope), len(others))
    return [*others[:place], kind(), *others[place:]]


def _as_tree(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn names with dots, as on a command line, into dictionaries: `search.distance` is `distance` of `search`."""
    tree: dict[str, Any] = {}
    for name, value in options.items():
        *path, last = name.split(".")
        value = _as_tree(value) if isinstance(value, Mapping) else value
        for part in reversed(path):
            last, value = part, {last: value}
        tree = _merged(tree, {last: value})
    return tree


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return one dictionary with the values of another put in, dictionaries within them likewise."""
    result = dict(one)
    for name, value in other.items():
        old = result.get(name)
        result[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
