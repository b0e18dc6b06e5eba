"""What answers without looking at a picture reach on the mini world: `python -m benchmarks.vqa_baselines`.

For each question of the evaluation the most common answer of the training: over all questions, over those of its type,
and over those with the same text.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable

from datamodules import MiniVQA
from datamodules.vqa_files import Question
from lit_clipq.metrics import VQAAccuracy
from lit_clipq.metrics.functional.vqa import process_answer
from lit_clipq.models import load_clip

GROUPS: dict[str, Callable[[Question], str]] = {
    "all": lambda _: "",
    "question type": lambda question: question.question_type,
    "question text": lambda question: question.text,
}


def majority(data: MiniVQA, group: Callable[[Question], str]) -> dict[str, float]:
    """Score the most common answer of each group of training questions; unknown groups get the most common of all."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in data.train_questions:
        for key in {group(question), ""}:
            counts[key][process_answer(question.common_answer)] += 1
    metric = VQAAccuracy()
    for question in data.val_questions:
        said = counts.get(group(question), counts[""]).most_common(1)[0][0]
        metric.update([said], [question.answers], [question.answer_type])
    return metric.compute()


def main() -> None:
    """Print the accuracy of each baseline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    data = MiniVQA(preset=parser.parse_args().preset)
    data.preprocessing = load_clip("mini-vit", "mini").preprocessing
    data.prepare_data()
    data.setup("fit")
    for name, group in GROUPS.items():
        scores = "  ".join(f"{metric} {100 * value:.2f}" for metric, value in majority(data, group).items())
        print(f"most common answer of {name:>13}: {scores}")


if __name__ == "__main__":
    main()
