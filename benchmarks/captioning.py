"""Captioning, fast against plain: `python -m benchmarks.captioning`.

Both engines caption the same pictures with the same networks in one run: the mini models, and random weights in the
shapes of ViT-B-32 and GPT-2 with the published 512 candidates and 5 iterations; the text tower float and quantized.
The claim: at least 10 times fewer token positions through the text tower, at least 5 times less time, and the same
captions (99 % of them in float32).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lit_clipq
from benchmarks.timing import medians
from lit_clipq.mini.world import picture
from lit_clipq.models import LoadedCLIP, encode_image
from lit_clipq.recipes import make_recipe
from lit_clipq.zerocap.engine import Captioner, make_captioner
from lit_clipq.zerocap.language import LoadedLanguageModel, load_language_model
from lit_clipq.zerocap.options import ZeroCapOptions, zerocap_options

POSITIONS, TIME, SAME = 10.0, 5.0, 0.99


class BytePairs:
    """The pieces of CLIP's vocabulary as a language model's tokenizer: what a word ends in begins with a space."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, size: int) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        pieces = [token for token in SimpleTokenizer().encoder if token.isascii()]
        words = [" " + piece.removesuffix("</w>") if piece.endswith("</w>") else piece for piece in pieces]
        self.pieces = [words[i % len(words)] for i in range(size)]
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(self, text: str, **_: object) -> Any:
        """Look words up."""
        words = ["."] if text == "." else [f" {word.lower()}" for word in text.split()]
        return argparse.Namespace(input_ids=[self.ids[word] for word in words])

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        """Join the pieces."""
        return "".join(self.pieces[token] for token in tokens)


@dataclass
class World:
    """Networks, pictures and options of one comparison."""

    title: str
    clip: LoadedCLIP
    lm: LoadedLanguageModel
    images: Tensor
    options: dict[str, Any]


def mini(pictures: int) -> World:
    """The mini models on mini pictures, with the published number of candidates and iterations."""
    clip = lit_clipq.load_clip("mini-vit", "mini")
    pixels = torch.stack([torch.from_numpy(picture("calibration", i)) for i in range(pictures)])
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    options = {"candidates": 512, "iterations": 5, "beams": 2, "max_tokens": 6}
    return World("mini-vit, mini-gpt2", clip, load_language_model("mini-gpt2"), images, options)


def large(pictures: int) -> World:
    """Random weights in the shapes of ViT-B-32 and GPT-2 (124 million parameters)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel._from_config(GPT2Config(), attn_implementation="eager").eval()
    lm = LoadedLanguageModel(model, BytePairs(model.config.vocab_size), "gpt2 (random weights)", start_id=0)
    clip = lit_clipq.load_clip("ViT-B-32-quickgelu")
    options = {"lm": lm.name, "prefix": "Image of a", "candidates": 512, "iterations": 5, "beams": 1, "max_tokens": 2}
    return World("ViT-B-32, GPT-2 (random weights)", clip, lm, torch.randn(pictures, 3, 224, 224), options)


def compare(world: World, what: str) -> bool:
    """Caption with both engines, print, and tell whether the claim holds."""
    world.lm.model.requires_grad_(False)
    engines: list[Captioner] = []
    captions: list[list[str]] = [[], []]
    with torch.no_grad():
        features = F.normalize(encode_image(world.clip.model, world.images), dim=-1)

    def run(place: int, engine: str) -> None:
        options: ZeroCapOptions = zerocap_options("mini", engine=engine, **world.options)
        with torch.inference_mode(False):
            captioner = make_captioner(world.clip.model, world.clip.preprocessing.tokenizer, world.lm, options)
            captions[place] = captioner.captions(features)
        engines.append(captioner)

    plain, fast = medians([lambda: run(0, "plain"), lambda: run(1, "fast")], runs=1, warmup=0)
    positions = [engine.candidates.positions for engine in engines]
    same = sum(a == b for a, b in zip(*captions, strict=True))
    fewer, faster = positions[0] / positions[1], plain / fast
    print(f"{world.title}, text tower {what}, {torch.get_num_threads()} threads")
    print(f"  positions {positions[0]:,} plain, {positions[1]:,} fast: {fewer:.1f}x fewer (claimed {POSITIONS:.0f}x)")
    print(f"  time {plain / 1e3:.1f} s plain, {fast / 1e3:.1f} s fast: {faster:.1f}x faster (claimed {TIME:.0f}x)")
    print(f"  {same} of {len(captions[0])} captions identical", flush=True)
    return fewer >= POSITIONS and faster >= TIME and same >= SAME * len(captions[0])


def quantized(clip: LoadedCLIP, size: int) -> nn.Module:
    """Quantize a CLIP in place to 8 bits, with static grids, attention products included."""
    texts = clip.preprocessing.tokenizer(["a picture of a small dog", "two people near a red house", "a blue cup"])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, size, size, generator=generator)
    lit_clipq.quantize(clip.model, [(images, texts)], make_recipe("vanilla", attention_products=True))
    return clip.model


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", nargs="+", choices=("mini", "large"), default=["mini", "large"])
    parser.add_argument("--pictures", type=int, help="by default 4 of the mini world and 2 large ones")
    options = parser.parse_args(args)
    held = True
    for name in options.worlds:
        world = mini(options.pictures or 4) if name == "mini" else large(options.pictures or 2)
        held &= compare(world, "float")
        quantized(world.clip, world.images.shape[-1])
        held &= compare(world, "at 8 bits")
    print("the claim holds" if held else "THE CLAIM DOES NOT HOLD")


if __name__ == "__main__":
    main()
