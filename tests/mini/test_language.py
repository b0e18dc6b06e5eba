"""What is said about scenes: captions, questions, the tokenizer's merges."""

import re
from collections import Counter
from itertools import pairwise

import pytest
from open_clip.tokenizer import SimpleTokenizer

from lit_clipq.mini.bpe import BPE_PATH, MERGES, corpus, learn_merges, write_merges
from lit_clipq.mini.captions import COLOUR_WORDS, PLACES, SHAPE_WORDS, captions, plural
from lit_clipq.mini.questions import questions
from lit_clipq.mini.rng import Rng
from lit_clipq.mini.scene import crowd, portrait
from lit_clipq.mini.world import picture_captions, picture_questions, scene_of

SAMPLE = 300
WORD_TO_SHAPE = {w: shape for shape, words in SHAPE_WORDS.items() for w in words}
WORD_TO_COLOUR = {w: colour for colour, words in COLOUR_WORDS.items() for w in words}


def shape_words(text: str) -> list[str]:
    """Find shape words, the longest first, in singular or plural."""
    text = re.sub("|".join(phrase for phrases in PLACES.values() for phrase in phrases), " ", text)
    forms = {form: word for word in WORD_TO_SHAPE for form in (word, plural(word))}
    pattern = "|".join(sorted(map(re.escape, forms), key=len, reverse=True))
    return [WORD_TO_SHAPE[forms[found]] for found in re.findall(rf"\b({pattern})\b", text)]


@pytest.mark.parametrize("index", range(0, SAMPLE, 10))
def test_captions_name_only_what_is_there(index):
    scene, _ = scene_of("val", index)
    for text in picture_captions("val", index):
        named = shape_words(text)
        assert named, text
        assert set(named) <= {t.shape for t in scene.things}, text
        words = re.sub("|".join(p for ps in PLACES.values() for p in ps), " ", text).split()
        colours = {WORD_TO_COLOUR[w] for w in words if w in WORD_TO_COLOUR}
        assert colours <= {t.colour for t in scene.things}, text


def test_stated_relations_hold_in_the_picture():
    checks = {
        r"left": lambda a, b: a.x < b.x,
        r"right": lambda a, b: a.x > b.x,
        r"above|over|higher than": lambda a, b: a.y < b.y,
        r"below|under|lower than": lambda a, b: a.y > b.y,
    }
    checked = 0
    for index in range(SAMPLE):
        scene, _ = scene_of("val", index)
        for text in picture_captions("val", index):
            parts = re.fullmatch(r"the (.+?) is (.+?) the (.+)", text)
            named = shape_words(text)
            if parts is None or len(named) != 2:
                continue
            pair = [[t for t in scene.things if t.shape == name] for name in named]
            if any(len(candidates) != 1 for candidates in pair):
                continue
            for pattern, holds in checks.items():
                if re.search(rf"\b({pattern})\b", parts.group(2)):
                    assert holds(pair[0][0], pair[1][0]), text
                    checked += 1
    assert checked > 50


def test_five_different_captions_that_few_pictures_share():
    counts = Counter()
    for index in range(SAMPLE):
        texts = picture_captions("val", index)
        assert len(set(texts)) == 5
        counts.update(texts)
    assert sum(count - 1 for count in counts.values()) <= 0.01 * 5 * SAMPLE
    openings = {" ".join(text.split()[:2]) for text in counts}
    assert len(openings) > 100


def test_portrait_captions_speak_of_the_main_thing():
    for index in range(30):
        scene = portrait(Rng(index))
        for text in captions(scene, Rng(index, "c"), portrait=True):
            assert set(shape_words(text)) == {scene.things[0].shape}, text


def test_articles_and_plurals():
    for index in range(SAMPLE):
        for text in picture_captions("val", index):
            assert not re.search(r"\ba (?=[aeio])(?!one)", text), text
            assert not re.search(r"\ban (?![aeiou]|hourglass)", text), text
    assert [plural(w) for w in ("fish", "box", "cross", "star")] == ["fish", "boxes", "crosses", "stars"]


def test_questions_have_ten_answers_and_the_majority_is_right():
    right = total = 0
    for index in range(SAMPLE):
        scene, _ = scene_of("val", index)
        for question in picture_questions("val", index):
            assert len(question.answers) == len(question.confidences) == 10
            assert question.answer_type in ("yes/no", "number", "other")
            majority = Counter(question.answers).most_common(1)[0][0]
            truth = None
            if question.text == "How many objects are there?":
                truth = {str(len(scene.things))}
            elif found := re.fullmatch(r"What color is the (\w+)\?", question.text):
                (colour,) = {t.colour for t in scene.things if t.shape == found.group(1)}
                truth = set(COLOUR_WORDS[colour])
            elif found := re.fullmatch(r"Is there an? (\w+) (\w+).*\?", question.text):
                there = any((t.colour, t.shape) == found.groups() for t in scene.things)
                truth = {"yes" if there else "no"}
            if truth is not None:
                right += majority in truth
                total += 1
    assert total > 200
    assert right / total > 0.99


def test_people_disagree_now_and_then():
    asked = [q for i in range(SAMPLE) for q in picture_questions("val", i)]
    agreement = sum(len(set(q.answers)) == 1 for q in asked) / len(asked)
    assert 0.15 < agreement < 0.6
    assert {q.answer_type for q in asked} == {"yes/no", "number", "other"}
    yes = [Counter(q.answers).most_common(1)[0][0] for q in asked if q.answer_type == "yes/no"]
    assert 0.35 < yes.count("yes") / len(yes) < 0.65


def test_questions_about_one_scene_differ():
    assert len({q.text for q in questions(crowd(Rng(1)), Rng(2), 8)}) == 8


def naive_merges(words: dict[str, int], limit: int) -> list[tuple[str, str]]:
    """Learn merges by the textbook: recount strings, replace text."""
    texts = {" ".join([*w[:-1], w[-1] + "</w>"]): n for w, n in words.items()}
    merges = []
    for _ in range(limit):
        pairs = Counter()
        for text, n in texts.items():
            symbols = text.split()
            for pair in pairwise(symbols):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        pattern = re.compile(r"(?<!\S)" + re.escape(" ".join(best)) + r"(?!\S)")
        texts = {pattern.sub("".join(best), text): n for text, n in texts.items()}
    return merges


def test_merges_agree_with_the_textbook():
    texts = ["low lower lowest", "new newer newest", "low low new wide"]
    assert learn_merges(texts, 12) == naive_merges(Counter(" ".join(texts).split()), 12)


def test_shipped_merges_are_those_learned_from_the_world(tmp_path):
    write_merges(learn_merges(corpus(), MERGES), tmp_path / "again.txt.gz")
    shipped, again = SimpleTokenizer(str(BPE_PATH)), SimpleTokenizer(str(tmp_path / "again.txt.gz"))
    assert shipped.encoder == again.encoder


def test_end_token_has_the_largest_id_and_every_caption_fits():
    tokenizer = SimpleTokenizer(str(BPE_PATH), context_length=32)
    assert tokenizer.eot_token_id == tokenizer.vocab_size - 1 == max(tokenizer.encoder.values())
    assert tokenizer.sot_token_id == tokenizer.vocab_size - 2
    texts = [text for i in range(SAMPLE) for text in picture_captions("val", i)]
    lengths = [len(tokenizer.encode(text)) + 2 for text in texts]
    assert max(lengths) <= 32
    assert sum(lengths) / sum(len(t.split()) + 2 for t in texts) < 1.15  # about a token a word
    for text in texts[:50]:
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")
