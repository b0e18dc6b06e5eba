"""The table of one run."""

from rich.console import Console

from lit_clipq.analysis.comparison import Comparison, comparison_table
from lit_clipq.nn.swap import QuantizationMap


def test_the_worst_layers_are_named_first():
    ratios = {"a": 30.0, "b": 5.0, "c": 12.0, "d": 40.0, "e": 11.0, "f": 13.5}
    layers = {name: {"sqnr_db": db} for name, db in ratios.items()}
    result = Comparison(
        task="retrieval", model="m", pretrained=None, recipe=None, bits=None, float_metrics={}, quantized_metrics={},
        differences={}, samples={}, float_bytes=2, quantized_bytes=1, calibration_seconds=0.0, calibration_samples=1,
        map=QuantizationMap(), versions={}, seed=0, layers=layers,
    )  # fmt: skip
    console = Console(width=120)
    with console.capture() as capture:
        console.print(comparison_table(result))
    worst = "lowest signal-to-noise ratio: b 5.0 dB, e 11.0 dB, c 12.0 dB, f 13.5 dB, a 30.0 dB"
    assert worst in [line.strip() for line in capture.get().splitlines()]
