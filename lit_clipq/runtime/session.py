"""Sessions of ONNX Runtime whose integer products are exact on every CPU.

Without VNNI the products of unsigned and signed bytes add up pairs in 16 bits and saturate, unless the session is told
to be precise (`session.x64quantprecision`): it then multiplies unsigned by unsigned bytes. With VNNI the products are
exact without, to the bit, and the entry would only make them slower; it is set where the CPU has none.
"""

from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lit_clipq.runtime.packages import need

Array = np.ndarray[Any, Any]
EXACT_FLAGS = ("avx512_vnni", "avx_vnni", "avxvnni", "amx_int8")
_LISTED = ("avx2", "avx512f", "avx512_bf16", *EXACT_FLAGS)


class Session(Protocol):
    """What is asked of a session."""

    def run(self, outputs: Any, inputs: dict[str, Array]) -> list[Array]:
        """Compute outputs by name (`None`: all) from inputs by name."""


def open_session(
    model: Path | str | bytes, *, threads: int | None = None, exact: bool = True, optimised: Path | None = None
) -> Any:
    """Open a session on the CPU.

    Args:
        model: File, or its content.
        threads: Of one product; `None` leaves it to ONNX Runtime.
        exact: Whether products must not saturate on CPUs without VNNI.
        optimised: Where the optimised graph is written.

    Raises:
        ConfigError: If ONNX Runtime is not installed.
    """
    ort = need("onnxruntime", "onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # advice about files written for one machine
    precise = exact and not multiplies_exactly()
    options.add_session_config_entry("session.x64quantprecision", "1" if precise else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@cache
def cpu_flags() -> tuple[str, ...]:
    """Return those flags of the CPU that decide about integer products; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    flags = {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return tuple(flag for flag in _LISTED if flag in flags)


def multiplies_exactly() -> bool:
    """Whether the CPU has instructions that add up products of bytes in 32 bits."""
    return any(flag in EXACT_FLAGS for flag in cpu_flags())
