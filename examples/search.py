"""Search a folder of pictures by text with an export; runs where torch is not installed.

python examples/search.py EXPORT PICTURES "a dog in the snow"
"""

import sys
import time
from pathlib import Path

from lit_clipq.runtime import Index, load


def main(folder: str, pictures: str, text: str) -> None:
    """Embed the pictures once, keep the index beside them, and print what fits the text best."""
    model = load(folder)
    kept = Path(pictures) / ".lit_clipq_index.npz"
    if not kept.is_file():
        Index.build(model, pictures).save(kept)
    index = Index.read(kept)
    start = time.perf_counter()
    hits = index.search(model, text, count=5)
    for hit in hits:
        print(f"{hit.score:.3f}  {hit.path}")
    print(f"{1000 * (time.perf_counter() - start):.1f} ms for {len(index.names)} pictures")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/search.py EXPORT PICTURES TEXT")
    main(*sys.argv[1:])
