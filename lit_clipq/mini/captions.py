"""Captions of a scene: five ways to say part of what is there."""

import re
from collections.abc import Callable, Sequence

from lit_clipq.mini.rng import Rng
from lit_clipq.mini.scene import CANVAS, Scene, Thing, above, left_of

CAPTIONS_PER_IMAGE = 5
LONGEST_CAPTION = 27
"""Words and punctuation marks of the longest caption, so that every caption fits the context of the mini models."""

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "hexagon": ("hexagon",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
    "moon": ("moon", "crescent"),
    "arrow": ("arrow",),
    "bolt": ("bolt", "lightning bolt"),
    "hourglass": ("hourglass", "sand timer"),
    "cloud": ("cloud",),
    "house": ("house", "hut"),
    "tree": ("tree", "pine"),
    "fish": ("fish",),
    "flower": ("flower", "blossom"),
    "mushroom": ("mushroom", "toadstool"),
    "key": ("key",),
    "cup": ("cup", "mug"),
    "boat": ("boat", "sailboat"),
    "umbrella": ("umbrella", "parasol"),
    "car": ("car",),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "brown": ("brown",),
    "white": ("white",),
    "black": ("black", "dark"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium",),
    "large": ("large", "big", "huge"),
}
TEXTURE_WORDS: dict[str, tuple[str, ...]] = {
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
}
TEXTURE_PHRASES: dict[str, tuple[str, ...]] = {
    "striped": ("with stripes", "in stripes"),
    "dotted": ("with dots", "full of dots"),
    "checkered": ("with checks", "in a check pattern"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "grass": ("on grass", "on the lawn", "in the meadow"),
    "sand": ("on sand", "on the beach", "in the desert"),
    "water": ("on water", "in the sea", "in the waves"),
    "snow": ("in the snow", "on snow"),
    "night": ("at night", "in the night sky", "in the dark"),
    "bricks": ("on bricks", "on a brick wall", "against a brick wall"),
    "wood": ("on wood", "on wooden boards", "on a wooden table"),
    "tiles": ("on tiles", "on a tiled floor", "on gray tiles"),
}
PREFIXES = (
    "a photo of",
    "a picture of",
    "an image of",
    "a drawing of",
    "a rendering of",
    "a close-up photo of",
    "a bad photo of",
    "a good photo of",
    "a cropped photo of",
    "a blurry photo of",
    "a low resolution photo of",
    "a pixelated photo of",
)
_NUMBERS = ("no", "one", "two", "three", "four")
_LEFT = ("to the left of", "left of", "on the left side of")
_RIGHT = ("to the right of", "right of", "on the right side of")
_ABOVE = ("above", "over", "higher than")
_BELOW = ("below", "under", "lower than")


def article(phrase: str) -> str:
    """Return the phrase with its indefinite article."""
    return ("an " if phrase[0] in "aeiou" or phrase.startswith("hourglass") else "a ") + phrase


def plural(noun: str) -> str:
    """Return the plural of a shape word."""
    if noun == "fish":
        return noun
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def corner(thing: Thing) -> str:
    """Return where in the picture a thing is: one of nine fields."""
    third = CANVAS // 3
    row = ("top", "", "bottom")[min(2, thing.y // third)]
    column = ("left", "", "right")[min(2, thing.x // third)]
    return " ".join(word for word in (row, column) if word) or "center"


def _word(rng: Rng, words: Sequence[str]) -> str:
    """Return the usual word, now and then another one."""
    return words[0] if rng.percent(75) else rng.choice(words)


def _noun(rng: Rng, thing: Thing, *, count: int = 1) -> str:
    """Describe a thing without its article: size, texture and colour now and then, the shape always."""
    words: list[str] = []
    if thing.size != "medium" and rng.percent(45):
        words.append(_word(rng, SIZE_WORDS[thing.size]))
    after = ""
    if thing.texture != "plain" and count == 1 and rng.percent(70):
        if rng.percent(65):
            words.append(_word(rng, TEXTURE_WORDS[thing.texture]))
        else:
            after = " " + rng.choice(TEXTURE_PHRASES[thing.texture])
    if rng.percent(72):
        words.append(_word(rng, COLOUR_WORDS[thing.colour]))
    shape = _word(rng, SHAPE_WORDS[thing.shape])
    return " ".join([*words, shape if count == 1 else plural(shape)]) + after


def _phrase(rng: Rng, thing: Thing) -> str:
    return article(_noun(rng, thing))


def _place(rng: Rng, scene: Scene, chance: int) -> str:
    return " " + rng.choice(PLACES[scene.background]) if rng.percent(chance) else ""


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def relation(rng: Rng, a: Thing, b: Thing) -> str:
    """Return how a lies with respect to b, in words."""
    if left_of(a, b):
        return rng.choice(_LEFT)
    if left_of(b, a):
        return rng.choice(_RIGHT)
    if above(a, b):
        return rng.choice(_ABOVE)
    if above(b, a):
        return rng.choice(_BELOW)
    return rng.choice(("next to", "near"))


def _same(a: Thing, b: Thing) -> bool:
    return (a.shape, a.colour) == (b.shape, b.colour)


def _listed(rng: Rng, scene: Scene) -> list[str]:
    """Return phrases for all things, two of a kind taken together, in random order."""
    phrases: list[str] = []
    seen: list[Thing] = []
    for thing in rng.sample(scene.things, len(scene.things)):
        count = sum(_same(thing, other) for other in scene.things)
        if any(_same(thing, other) for other in seen):
            continue
        seen.append(thing)
        phrases.append(_phrase(rng, thing) if count == 1 else f"{_NUMBERS[count]} {_plain(rng, thing)}")
    return phrases


def _plain(rng: Rng, thing: Thing) -> str:
    """Return colour and plural of a thing that is there more than once."""
    return f"{_word(rng, COLOUR_WORDS[thing.colour])} {plural(_word(rng, SHAPE_WORDS[thing.shape]))}"


def _pair(rng: Rng, scene: Scene) -> str:
    a, b = rng.sample(scene.things, 2)
    opening = rng.choice(("", "", "there is ", "you can see "))
    return f"{opening}{_phrase(rng, a)} {relation(rng, a, b)} {_phrase(rng, b)}{_place(rng, scene, 30)}"


def _verb(rng: Rng, scene: Scene) -> str:
    a, b = rng.sample(scene.things, 2)
    return f"the {_noun(rng, a)} is {relation(rng, a, b)} the {_noun(rng, b)}{_place(rng, scene, 25)}"


def _list(rng: Rng, scene: Scene) -> str:
    return _join(_listed(rng, scene)) + _place(rng, scene, 40)


def _prefixed(rng: Rng, scene: Scene) -> str:
    return f"{rng.choice(PREFIXES)} {_join(_listed(rng, scene)[:3])}{_place(rng, scene, 35)}"


def _placed_first(rng: Rng, scene: Scene) -> str:
    opening = rng.choice(PLACES[scene.background])
    if rng.percent(50):
        return f"{opening} you can see {_join(_listed(rng, scene))}"
    return f"{opening}: {_join(_listed(rng, scene))}"


def _corners(rng: Rng, scene: Scene) -> str:
    a, b = rng.sample(scene.things, 2)
    return f"{_phrase(rng, a)} {_where(a)} and {_phrase(rng, b)} {_where(b)}{_place(rng, scene, 15)}"


def _where(thing: Thing) -> str:
    field = corner(thing)
    return "in the center" if field == "center" else f"at the {field}"


def _counted(rng: Rng, scene: Scene) -> str:
    count = _NUMBERS[len(scene.things)]
    noun = rng.choice(("things", "objects", "shapes"))
    some = _listed(rng, scene)[:2]
    tail = f", among them {_join(some)}" if len(scene.things) > 2 else f", {_join(some)}"
    return f"{count} {noun}{_place(rng, scene, 50)}{tail}"


def _between(rng: Rng, scene: Scene) -> str:
    a, b, c = rng.sample(scene.things, 3)
    return f"{_phrase(rng, a)} {relation(rng, a, b)} {_phrase(rng, b)}, with {_phrase(rng, c)} {relation(rng, c, a)} it"


_CROWD: tuple[Callable[[Rng, Scene], str], ...] = (_pair, _verb, _list, _prefixed, _placed_first, _corners, _counted)


def _crowd_caption(rng: Rng, scene: Scene) -> str:
    if len(scene.things) > 2 and rng.percent(15):
        return _between(rng, scene)
    return rng.choice(_CROWD)(rng, scene)


def _portrait_caption(rng: Rng, scene: Scene) -> str:
    main = scene.things[0]
    if rng.percent(70):
        noun = _noun(rng, main) if rng.percent(40) else _word(rng, SHAPE_WORDS[main.shape])
        return f"{rng.choice(PREFIXES)} {'the ' + noun if rng.percent(20) else article(noun)}{_place(rng, scene, 15)}"
    return f"{_phrase(rng, main)}{_place(rng, scene, 40)}"


def captions(scene: Scene, rng: Rng, *, portrait: bool = False) -> list[str]:
    """Write five different captions.

    Args:
        scene: with two things at least, unless `portrait`.
        rng: decides wording.
        portrait: speak of the largest thing alone.

    Returns:
        `CAPTIONS_PER_IMAGE` texts in lower case without a full stop.
    """
    write = _portrait_caption if portrait or len(scene.things) < 2 else _crowd_caption
    texts: list[str] = []
    while len(texts) < CAPTIONS_PER_IMAGE:
        text = write(rng, scene)
        if text not in texts and len(re.findall(r"\w+|[^\w\s]", text)) <= LONGEST_CAPTION:
            texts.append(text)
    return texts
