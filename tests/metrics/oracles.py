"""Slow and obvious versions of the metrics: loops in float64 over items and, for tiny cases, over every order."""

import re
from itertools import permutations

import torch


def lattice(rows, dim, seed):
    """Random embeddings whose cosine similarities are exact in float32: four entries of +-1 each, so of length 2."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(rows, dim)
    for row in values:
        row[torch.randperm(dim, generator=generator)[:4]] = torch.randint(0, 2, (4,), generator=generator) * 2.0 - 1
    return values


def cosine(a, b):
    total = norm_a = norm_b = 0.0
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        total, norm_a, norm_b = total + x * y, norm_a + x * x, norm_b + y * y
    return total / (norm_a**0.5 * norm_b**0.5) if norm_a and norm_b else 0.0


def hit_over_all_orders(scores, relevant, k):
    """Mean hit over every order of the items that is sorted by score."""
    hits = []
    for order in permutations(range(len(scores))):
        ranked = [scores[item] for item in order]
        if ranked == sorted(ranked, reverse=True):
            hits.append(any(item in relevant for item in order[:k]))
    return sum(hits) / len(hits)


def hit_by_drawing(scores, relevant, k):
    """Probability of a relevant item among the first k, drawing the tied items one by one."""
    best = max(scores[item] for item in relevant)
    better = sum(score > best for score in scores)
    tied = [item for item, score in enumerate(scores) if score == best]
    blanks = sum(item not in relevant for item in tied)
    miss = 1.0
    for drawn in range(max(0, min(k - better, len(tied)))):
        miss *= max(0, blanks - drawn) / (len(tied) - drawn)
    return 1.0 - miss


def recall(images, texts, pairs, ks, hit=hit_by_drawing):
    """Recall both ways by loops over queries, items and dimensions; pairs hold rows (text, image) per caption."""
    captions = pairs.tolist()
    similarity = [[cosine(image, text) for text in texts] for image in images]
    results = {}
    for k in ks:
        to_text, to_image, to_any = [], [], []
        for image in range(len(images)):
            scores = [similarity[image][text] for text, _ in captions]
            own = {number for number, (_, owner) in enumerate(captions) if owner == image}
            to_text.append(hit(scores, own, k))
        for text, image in captions:
            scores = [similarity[other][text] for other in range(len(images))]
            to_image.append(hit(scores, {image}, k))
            to_any.append(hit(scores, {owner for same, owner in captions if same == text}, k))
        results[f"recall@{k}_i2t"] = sum(to_text) / len(to_text)
        results[f"recall@{k}_t2i"] = sum(to_image) / len(to_image)
        results[f"recall@{k}_t2i_any_identical"] = sum(to_any) / len(to_any)
    return results


def topk(logits, labels, ks, hit=hit_by_drawing):
    rows = list(zip(logits.tolist(), labels.tolist(), strict=True))
    return {f"top{k}": sum(hit(scores, {label}, k) for scores, label in rows) / len(rows) for k in ks}


def processed_answer(text):
    """The official rules read character by character, without contractions."""
    number = any(
        a.isdecimal() and b == "," and c.isdecimal() for a, b, c in zip(text, text[1:], text[2:], strict=False)
    )

    def kept(mark):
        beside_space = any(pair in text for pair in (mark + " ", " " + mark))
        return "" if number or beside_space else " "

    marks = ";/[]{}()=+_-><@`,?!" + '"' + chr(92)
    text = "".join(kept(character) if character in marks else character for character in text)
    text = re.sub(r"(?!<=\d)(\.)(?!\d)", "", text, count=32)
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    words = [str(numbers.index(word)) if word in numbers else word for word in text.lower().split()]
    return " ".join("0" if word == "none" else word for word in words if word not in ("a", "an", "the"))


def leave_one_out(prediction, answers):
    """Mean over annotators of min(1, others with this answer / 3), for answers that no rule changes."""
    total = 0.0
    for left_out in range(len(answers)):
        others = [answer for index, answer in enumerate(answers) if index != left_out]
        total += min(1.0, sum(answer == prediction for answer in others) / 3)
    return total / len(answers)


def vqa(preds, target, types):
    scores = [leave_one_out(said, answers) for said, answers in zip(preds, target, strict=True)]
    found = {"vqa_accuracy": sum(scores) / len(scores)}
    for name in set(types):
        of_type = [score for score, kind in zip(scores, types, strict=True) if kind == name]
        found[f"vqa_accuracy_{name.replace('/', '_')}"] = sum(of_type) / len(of_type)
    return found
