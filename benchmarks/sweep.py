"""A sweep against a `validate` run for each of its points: `python -m benchmarks.sweep`.

Retrieval in the mini world, a grid of five widths of the image tower by five of the text tower, one
calibration seed: 25 points. Both are run as a user runs them, as processes, on a world that is drawn already, in turn
in one run of this program. Every number of the points that `validate` measured is compared with the sweep's.

All 25 `validate` runs are made with `--all`. Otherwise some are: `--runs` of those with both towers quantized, one of
each other kind, and the time of 25 is extrapolated from them: 16 x both towers + 4 x image tower + 4 x text tower +
float. The float measurement is remembered by `validate` between runs, as it is for a user.

The machine may be shared: printed are wall time and processor time, which counts work and not waiting, and the load.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from lit_clipq.analysis.records import PointRecord, read_records

WIDTHS = (32, 16, 8, 4, 2)
KINDS = {
    "both towers": [(v, t) for v in WIDTHS[1:] for t in WIDTHS[1:]],
    "image tower": [(v, 32) for v in WIDTHS[1:]],
    "text tower": [(32, t) for t in WIDTHS[1:]],
    "float": [(32, 32)],
}


class Seconds(NamedTuple):
    """Time of a process."""

    wall: float
    processor: float


def run(*args: str) -> Seconds:
    """Run the command line in a process of its own."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "lit_clipq.cli", *args], check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Seconds(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def check(record: PointRecord, results: dict) -> None:
    """Compare a point with a `validate` run.

    Raises:
        SystemExit: If any number differs.
    """
    differences = {name: vars(interval) for name, interval in record.differences.items()}
    size = {"float": record.float_bytes, "quantized": record.quantized_bytes}
    if (record.metrics, differences, size) != (
        results["metrics"]["quantized"],
        results["metrics"]["difference"],
        results["size_bytes"],
    ):
        sys.exit(f"{record.widths_in_words} differs: {record.metrics} and {results['metrics']}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="ptq4clip")
    parser.add_argument("--config", default="configs/mini/retrieval.yaml")
    parser.add_argument("--runs", type=int, default=2, help="validate runs with both towers quantized")
    parser.add_argument("--all", action="store_true", help="all 25 validate runs")
    args = parser.parse_args()
    common = ["--config", args.config, "--quantize.recipe", args.recipe, "--trainer.accelerator", "cpu"]
    chosen = {kind: places if args.all else places[:1] for kind, places in KINDS.items()}
    if not args.all:
        step = max(1, len(KINDS["both towers"]) // args.runs)
        chosen["both towers"] = KINDS["both towers"][step // 2 :: step][: args.runs]
    with tempfile.TemporaryDirectory() as folder:
        path, results = Path(folder) / "results.jsonl", Path(folder) / "results.json"
        run("validate", *common, "--quantize.recipe", "null", "--results", str(results))  # draws the world
        grid = [f"--sweep.{tower}_bits={list(WIDTHS)}" for tower in ("vision", "text")]
        swept = run("sweep", *common, *grid, "--results", str(path))
        points = {(r.widths["vision_weight"], r.widths["text_weight"]): r for r in read_records(path)[1:]}
        print(f"sweep of {len(points)} points: {swept.wall:.1f} s, {swept.processor:.1f} s of processor time")
        total = [0.0, 0.0]
        for kind, places in chosen.items():
            times = []
            for vision, text in places:
                widths = ["--quantize.vision_bits", str(vision), "--quantize.text_bits", str(text)]
                times.append(run("validate", *common, *widths, "--results", str(results)))
                check(points[vision, text], json.loads(results.read_text()))
            mean = Seconds(*(statistics.mean(column) for column in zip(*times, strict=True)))
            count = len(KINDS[kind])
            told = f"{mean.wall:.1f} s, {mean.processor:.1f} s of processor time"
            print(f"validate, {kind}: {told} (mean of {len(times)} of {count})")
            total = [sum_ + count * seconds for sum_, seconds in zip(total, mean, strict=True)]
    how = "25 validate runs" if args.all else "25 validate runs, extrapolated"
    print(f"{how}: {total[0]:.1f} s, {total[1]:.1f} s of processor time; all numbers compared are identical")
    ratios = f"{total[0] / swept.wall:.1f} x faster by the clock, {total[1] / swept.processor:.1f} x by processor time"
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"the sweep is {ratios}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, {threads} threads")


if __name__ == "__main__":
    main()
