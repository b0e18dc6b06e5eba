"""Calibrate, quantize and evaluate CLIP after training."""

__version__ = "0.1.0"
