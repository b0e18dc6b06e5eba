"""Slow and obvious versions of the metrics: loops in float64 over items and, for tiny cases, over every order."""

import math
import re
from itertools import combinations, permutations

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


def captioning(captions, references):
    """CIDEr-D, ROUGE-L and BLEU of lower-case captions without punctuation, by loops over a vocabulary of n-grams."""
    captions, references = [c.split() for c in captions], [[r.split() for r in texts] for texts in references]
    cider = [0.0] * len(captions)
    for n in (1, 2, 3, 4):
        everything = [*captions, *(text for texts in references for text in texts)]
        vocabulary = sorted({gram for text in everything for gram in grams(text, n)})
        images = [sum(any(gram in grams(text, n) for text in texts) for texts in references) for gram in vocabulary]
        idf = [math.log(len(captions) / max(1, count)) for count in images]
        for i, (caption, texts) in enumerate(zip(captions, references, strict=True)):
            for text in texts:
                a, b = (
                    [grams(x, n).count(g) * w for g, w in zip(vocabulary, idf, strict=True)] for x in (caption, text)
                )
                dot = sum(min(x, y) * y for x, y in zip(a, b, strict=True))
                size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
                difference = len(grams(caption, 2)) - len(grams(text, 2))
                cider[i] += 10 * (dot / size if size else 0.0) * math.exp(-(difference**2) / 72) / len(texts) / 4
    rouge = [_rouge(caption, texts) for caption, texts in zip(captions, references, strict=True)]
    results = {"cider": math.fsum(cider) / len(cider), "rouge_l": math.fsum(rouge) / len(rouge)}
    shares = []
    for n in (1, 2, 3, 4):
        pairs = [(grams(c, n), [grams(r, n) for r in texts]) for c, texts in zip(captions, references, strict=True)]
        hits = sum(min(c.count(g), max(r.count(g) for r in texts)) for c, texts in pairs for g in set(c))
        shares.append((hits + 1e-15) / (sum(len(c) for c, _ in pairs) + 1e-9))
        closest = [min((abs(len(r) - len(c)), len(r)) for r in t)[1] for c, t in zip(captions, references, strict=True)]
        ratio = (sum(map(len, captions)) + 1e-15) / (sum(closest) + 1e-9)
        results[f"bleu{n}"] = math.prod(shares) ** (1 / n) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)
    return results


def grams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _rouge(caption, texts):
    common = [_common(caption, text) for text in texts]
    p, r = max(common) / len(caption), max(c / len(text) for c, text in zip(common, texts, strict=True))
    return 2.44 * p * r / (r + 1.44 * p) if p and r else 0.0


def _common(a, b):
    """Longest common subsequence by trying every subset of the shorter text, longest first."""
    short, long = sorted((a, b), key=len)
    for size in range(len(short), 0, -1):
        for chosen in combinations(short, size):
            rest = iter(long)
            if all(token in rest for token in chosen):
                return size
    return 0


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


def agreement(images, float_images, texts, float_texts, ks):
    """Agreement of two searches by loops over queries and items; ranks by counting."""
    results = {}
    for kind, rows, floats in (("image", images, float_images), ("text", texts, float_texts)):
        results[f"cosine_{kind}"] = sum(map(cosine, rows, floats)) / len(rows)
    quantized, exact = {"i": images, "t": texts}, {"i": float_images, "t": float_texts}
    for query, item in ("ti", "it"):
        for suffix, q, i in (
            ("", quantized, quantized),
            ("_quantized_queries", quantized, exact),
            ("_quantized_index", exact, quantized),
        ):
            per_query = [
                _agreement_of_query(a, exact[item], b, i[item], ks) for a, b in zip(exact[query], q[query], strict=True)
            ]
            for name in per_query[0]:
                results[f"{name}_{query}2{item}{suffix}"] = sum(row[name] for row in per_query) / len(per_query)
    return results


def _agreement_of_query(first, first_index, second, second_index, ks):
    searches = [
        [cosine(query, item) for item in index] for query, index in ((first, first_index), (second, second_index))
    ]
    found = {}
    for k in ks:
        one, other = (set(sorted(range(len(s)), key=lambda j: (-s[j], j))[:k]) for s in searches)
        found[f"top{k}"] = len(one & other) / k
    one, other = ([sum(y < x for y in s) + (sum(y == x for y in s) + 1) / 2 for x in s] for s in searches)
    mean = (len(one) + 1) / 2
    spread = [sum((x - mean) ** 2 for x in ranks) for ranks in (one, other)]
    product = sum((x - mean) * (y - mean) for x, y in zip(one, other, strict=True))
    found["rank_correlation"] = product / (spread[0] * spread[1]) ** 0.5 if all(spread) else float(not any(spread))
    return found
