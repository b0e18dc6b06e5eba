"""Questions about a scene, each with the answers of ten people who do not always agree."""

from collections.abc import Callable
from dataclasses import dataclass

from lit_clipq.mini.captions import (
    COLOUR_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    TEXTURE_WORDS,
    article,
    plural,
)
from lit_clipq.mini.rng import Rng
from lit_clipq.mini.scene import BACKGROUNDS, COLOURS, Scene, Thing, above, left_of
from lit_clipq.mini.shapes import SHAPES

ANSWERS_PER_QUESTION = 10

_ALIKE: dict[str, tuple[str, ...]] = {
    "red": ("orange", "pink"),
    "orange": ("red", "yellow"),
    "yellow": ("orange",),
    "green": ("blue",),
    "blue": ("purple",),
    "purple": ("pink", "blue"),
    "pink": ("purple", "red"),
    "brown": ("orange", "black"),
    "white": ("gray",),
    "black": ("gray", "blue"),
    "circle": ("hexagon",),
    "hexagon": ("circle",),
    "square": ("diamond",),
    "diamond": ("square",),
    "tree": ("triangle",),
    "mushroom": ("umbrella",),
    "umbrella": ("mushroom",),
    "hourglass": ("triangle",),
    "moon": ("banana",),
    "ring": ("circle",),
    "bolt": ("star",),
    "flower": ("cloud",),
    "striped": ("checkered",),
    "dotted": ("checkered",),
    "checkered": ("dotted", "striped"),
    "plain": ("none", "solid"),
    "small": ("medium",),
    "large": ("medium",),
    "night": ("space",),
    "sand": ("dirt",),
    "water": ("sky",),
}
_SAME: dict[str, tuple[str, ...]] = {
    **SHAPE_WORDS,
    **COLOUR_WORDS,
    **{name: SIZE_WORDS[name] for name in ("small", "large")},
    **TEXTURE_WORDS,
    "plain": ("plain", "no pattern"),
    "grass": ("grass", "lawn"),
    "sand": ("sand", "beach"),
    "water": ("water", "sea"),
    "snow": ("snow", "ice"),
    "night": ("night", "night sky", "dark"),
    "bricks": ("bricks", "brick wall", "brick"),
    "wood": ("wood", "wooden boards"),
    "tiles": ("tiles", "tiled floor"),
}
_COUNT_WORDS = ("0", "1", "2", "3", "4", "5", "6")


@dataclass(frozen=True)
class Question:
    """A question in the terms of VQA v2."""

    text: str
    kind: str
    """The first words, as VQA v2's question_type."""
    answer_type: str
    """`yes/no`, `number` or `other`."""
    answers: tuple[str, ...]
    """Ten answers."""
    confidences: tuple[str, ...]
    """`yes`, `maybe` or `no` for each answer."""


Draft = tuple[str, str, str, str]
"""Text, kind, answer type, truth."""


def _answer(rng: Rng, truth: str, answer_type: str) -> tuple[str, str]:
    """Return what one person says, and how sure they are."""
    if rng.percent(90):
        said = truth
        if answer_type == "other" and rng.percent(18):
            said = rng.choice(_SAME.get(truth, (truth,)))
    elif answer_type == "yes/no":
        said = {"yes": "no", "no": "yes"}[truth]
    elif answer_type == "number":
        said = _COUNT_WORDS[max(0, _COUNT_WORDS.index(truth) + rng.choice((-1, 1)))]
    else:
        said = rng.choice(_ALIKE.get(truth, ("unknown",)))
    if said == truth:
        return said, rng.weighted(("yes", "maybe", "no"), (92, 7, 1))
    return said, rng.weighted(("yes", "maybe", "no"), (55, 35, 10))


def _unique(scene: Scene) -> list[Thing]:
    """Return the things whose shape occurs once."""
    return [t for t in scene.things if sum(t.shape == o.shape for o in scene.things) == 1]


def _exists(rng: Rng, scene: Scene) -> Draft:
    thing = rng.choice(scene.things)
    colour, shape = thing.colour, thing.shape
    if rng.percent(50):  # a wrong colour or a wrong shape, not both
        if rng.percent(50):
            colour = rng.choice([c for c in COLOURS if all((t.shape, t.colour) != (shape, c) for t in scene.things)])
        else:
            shape = rng.choice([s for s in SHAPES if all((t.shape, t.colour) != (s, colour) for t in scene.things)])
    truth = "yes" if any((t.shape, t.colour) == (shape, colour) for t in scene.things) else "no"
    noun = article(f"{colour} {shape}")
    return rng.choice((f"Is there {noun}?", f"Is there {noun} in the picture?")), "is there a", "yes/no", truth


def _colour(rng: Rng, scene: Scene) -> Draft | None:
    things = _unique(scene)
    if not things:
        return None
    thing = rng.choice(things)
    return f"What color is the {thing.shape}?", "what color is the", "other", thing.colour


def _shape(rng: Rng, scene: Scene) -> Draft | None:
    things = [t for t in scene.things if sum(t.colour == o.colour for o in scene.things) == 1]
    if not things:
        return None
    thing = rng.choice(things)
    return f"What is the {thing.colour} object?", "what is the", "other", thing.shape


def _texture(rng: Rng, scene: Scene) -> Draft | None:
    things = _unique(scene)
    if not things:
        return None
    patterned = [t for t in things if t.texture != "plain"]
    thing = rng.choice(patterned or things)
    if rng.percent(50):
        return f"What pattern is on the {thing.shape}?", "what", "other", thing.texture
    asked = rng.choice(tuple(TEXTURE_WORDS)) if rng.percent(50) else thing.texture
    return f"Is the {thing.shape} {asked}?", "is the", "yes/no", "yes" if asked == thing.texture else "no"


def _count(rng: Rng, scene: Scene) -> Draft:
    if rng.percent(40):
        return "How many objects are there?", "how many", "number", str(len(scene.things))
    name = rng.choice(scene.things).shape if rng.percent(60) else rng.choice(tuple(SHAPES))
    total = sum(t.shape == name for t in scene.things)
    return f"How many {plural(name)} are there?", "how many", "number", str(total)


def _side(rng: Rng, scene: Scene) -> Draft | None:
    things = _unique(scene)
    pairs = [(a, b) for a in things for b in things if left_of(a, b) or above(a, b)]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    sideways = left_of(a, b)
    truth = rng.percent(50)
    if not truth:
        a, b = b, a
    relation = "to the left of" if sideways else "above"
    return f"Is the {a.shape} {relation} the {b.shape}?", "is the", "yes/no", "yes" if truth else "no"


def _neighbour(rng: Rng, scene: Scene) -> Draft | None:
    found: list[tuple[str, str, str]] = []
    for b in _unique(scene):
        for words, test in (
            ("to the left of", lambda a, b: left_of(a, b)),
            ("to the right of", lambda a, b: left_of(b, a)),
            ("above", lambda a, b: above(a, b)),
            ("below", lambda a, b: above(b, a)),
        ):
            matches = [a for a in scene.things if a is not b and test(a, b)]
            if len(matches) == 1:
                found.append((words, b.shape, matches[0].shape))
    if not found:
        return None
    words, shape, truth = rng.choice(found)
    return f"What is {words} the {shape}?", "what is", "other", truth


def _background(rng: Rng, scene: Scene) -> Draft:
    if rng.percent(60):
        return "What is in the background?", "what is in the", "other", scene.background
    asked = rng.choice(BACKGROUNDS) if rng.percent(50) else scene.background
    return f"Is the background {asked}?", "is the", "yes/no", "yes" if asked == scene.background else "no"


def _size(rng: Rng, scene: Scene) -> Draft | None:
    things = [t for t in _unique(scene) if t.size != "medium"]
    if not things:
        return None
    thing = rng.choice(things)
    return f"How big is the {thing.shape}?", "how", "other", thing.size


_ASKERS: tuple[Callable[[Rng, Scene], Draft | None], ...] = (
    _exists,
    _colour,
    _shape,
    _texture,
    _count,
    _side,
    _neighbour,
    _background,
    _size,
)
_OFTEN = (22, 18, 14, 8, 16, 10, 7, 6, 4)


def questions(scene: Scene, rng: Rng, count: int = 3) -> list[Question]:
    """Ask `count` different questions about a scene.

    Args:
        scene: what is in the picture.
        rng: decides questions, answers and confidence.
        count: number of questions.

    Returns:
        The questions, each with `ANSWERS_PER_QUESTION` answers; about nine in ten answers are right, the others are
        near misses: a similar colour or shape, one more or less, a synonym.
    """
    asked: dict[str, Question] = {}
    while len(asked) < count:
        draft = rng.weighted(_ASKERS, _OFTEN)(rng, scene)
        if draft is None or draft[0] in asked:
            continue
        text, kind, answer_type, truth = draft
        replies = [_answer(rng, truth, answer_type) for _ in range(ANSWERS_PER_QUESTION)]
        said, sure = zip(*replies, strict=True)
        asked[text] = Question(text, kind, answer_type, said, sure)
    return list(asked.values())
