"""Texts that are longer than the context are counted, whatever the tokenizer pads and ends a text with."""

import open_clip
import pytest
from open_clip.tokenizer import HFTokenizer

from lit_clipq.models.preprocessing import Preprocessing, count_cut_texts

TEXTS = ["", "a cat", "a " * 5, "a " * 6, "a " * 7, "a " * 8, "the quick brown fox jumps over the lazy dog", "a " * 8]
WORDS = ["a", "cat", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


def preprocessing(tokenizer, length):
    return Preprocessing(lambda image: image, tokenizer, length, "test")


@pytest.mark.parametrize("length", [2, 4, 8, 9, 10, 77])
def test_bytes_and_their_pairs(length):
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    expected = sum(len(tokenizer.encode(text)) + 2 > length for text in TEXTS)  # begin and end
    assert count_cut_texts(preprocessing(tokenizer, length), TEXTS) == expected


@pytest.fixture(params=["ends and pads with the same", "pads with another", "ends with nothing"])
def word_tokenizer(request, tmp_path):
    """A tokenizer of words as on the hub, and how many tokens it adds to a text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = request.param != "ends with nothing"
    if ends:
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    padding = "</s>" if request.param == "ends and pads with the same" else "<pad>"
    names = {"pad_token": padding, "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(tmp_path)
    return str(tmp_path), int(ends)


@pytest.mark.parametrize("length", [3, 6, 7, 8, 9, 10])
def test_tokenizers_of_the_hub(word_tokenizer, length):
    folder, added = word_tokenizer
    expected = sum(len(text.split()) + added > length for text in TEXTS)
    assert count_cut_texts(preprocessing(HFTokenizer(folder, context_length=length), length), TEXTS) == expected
