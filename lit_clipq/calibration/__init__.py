"""Calibration: run the network on a few batches and keep what the recipes need."""
