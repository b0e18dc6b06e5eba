"""The mini world's language model: its configuration and its tokenizer, as transformers reads them from a folder.

The tokenizer is GPT-2's byte-level BPE with a vocabulary of its own, in which every word of the captions is one token.
`python -m lit_clipq.mini.gpt2` writes the shipped files again; the weights are trained by
`configs/mini/pretrain_gpt2.yaml`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_clipq.mini.assets import LANGUAGE_MODEL_DIR
from lit_clipq.mini.bpe import merges_of
from lit_clipq.mini.world import picture_captions

END_OF_TEXT = "<|endoftext|>"
"""Begins and ends a text, as in GPT-2."""
END = "."
"""Ends a caption."""
MERGES = 1000
"""Merges at most."""
_PIECES = re.compile(r" ?[a-z]+| ?[^\sa-z]+")
_SPACE = "\u0120"  # how byte-level BPE writes a space


def training_text(caption: str) -> str:
    """Return what the language model learns of a caption: the caption with a full stop between end-of-text marks."""
    return f"{END_OF_TEXT}{caption}{END}{END_OF_TEXT}"


def byte_symbols() -> list[str]:
    """Return the character that stands for each byte in GPT-2's vocabulary: printable ones for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_json(texts: Iterable[str]) -> dict[str, Any]:
    """Return the tokenizer learned from lower-case ASCII texts, in the format of `tokenizer.json`."""
    counts = Counter(piece for text in texts for piece in _PIECES.findall(text))
    merges = merges_of({tuple(piece.replace(" ", _SPACE)): count for piece, count in counts.items()}, MERGES)
    tokens = [*byte_symbols(), *("".join(pair) for pair in merges), END_OF_TEXT]
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(tokens) - 1, "content": END_OF_TEXT, **special}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def corpus() -> list[str]:
    """Return the captions that the merges are learned from, each with its full stop."""
    return [text + END for i in range(2000) for text in picture_captions("train", i)]


def model_json(vocabulary: int) -> dict[str, Any]:
    """Return the configuration of the model: two layers of width 128, texts of up to 48 tokens."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocabulary,
        "n_positions": 48,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": vocabulary - 1,
        "eos_token_id": vocabulary - 1,
        "tie_word_embeddings": True,
    }


def write_files(folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `config.json`."""
    tokenizer = tokenizer_json(corpus())
    vocabulary = len(tokenizer["model"]["vocab"])
    marks = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **marks}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
        ("config.json", model_json(vocabulary)),
    ):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_files(LANGUAGE_MODEL_DIR)
