"""What towers made, by what they are: a 5 x 5 grid of widths is 5 + 5 passes of single towers."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from lit_clipq.contracts import TowerOutputs

TOWERS = ("vision", "text")


def tower_hashes(clip: nn.Module) -> dict[str, str]:
    """Hash what each tower of a CLIP computes: its modules with their options, and their state.

    Whatever is not the image tower counts as the text tower. Towers with the same hash give the same embeddings to the
    bit.
    """
    digests = {tower: hashlib.blake2b(digest_size=16) for tower in TOWERS}
    for name, module in clip.named_modules():
        if name:
            options = repr(module) if not any(True for _ in module.children()) else type(module).__qualname__
            digests[_tower(name)].update(f"{name} {options}".encode())
    for name, value in clip.state_dict().items():
        digest = digests[_tower(name)]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return {tower: digest.hexdigest() for tower, digest in digests.items()}


class TowerMemory:
    """What towers made of the evaluation set, by tower and hash."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[str, str], list[TowerOutputs]] = {}

    def missing(self, hashes: Mapping[str, str]) -> tuple[str, ...]:
        """Return the towers of a network that have to run."""
        return tuple(tower for tower, digest in hashes.items() if (tower, digest) not in self._outputs)

    def keep(self, hashes: Mapping[str, str], outputs: Mapping[str, Sequence[TowerOutputs]]) -> None:
        """Keep what some towers of a network made."""
        for tower, batches in outputs.items():
            self._outputs[tower, hashes[tower]] = list(batches)

    def outputs(self, hashes: Mapping[str, str]) -> dict[str, list[TowerOutputs]]:
        """Return what the towers of a network made."""
        return {tower: self._outputs[tower, digest] for tower, digest in hashes.items()}

    def forget_all_but(self, hashes: Iterable[tuple[str, str]]) -> None:
        """Free what is not among these towers."""
        kept = set(hashes)
        self._outputs = {key: value for key, value in self._outputs.items() if key in kept}


def passes(networks: Mapping[str, Mapping[str, str]], memory: TowerMemory) -> list[str]:
    """Choose networks whose evaluation makes all towers known, two towers at a time where that is possible.

    Args:
        networks: Hashes by tower, by the id of a network.
        memory: What is known already.

    Returns:
        Ids in the order in which they are to run.

    Example:
        >>> grid = {f"{v}{t}": {"vision": v, "text": t} for v in "abc" for t in "abc"}
        >>> passes(grid, TowerMemory())
        ['aa', 'bb', 'cc']
    """
    unknown = {(tower, h[tower]) for h in networks.values() for tower in memory.missing(h)}
    chosen = []
    while unknown:
        best = max(networks, key=lambda name: len(unknown & set(networks[name].items())))
        chosen.append(best)
        unknown -= set(networks[best].items())
    return chosen


def _tower(name: str) -> str:
    return "vision" if name == "visual" or name.startswith("visual.") else "text"
