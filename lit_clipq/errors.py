"""Errors a user can cause, each one sentence: what was expected, what arrived, what to do next."""


class LitClipqError(Exception):
    """Base of all errors that the command line prints without a traceback before it exits with code 1."""


class ConfigError(LitClipqError):
    """An option, or a combination of options, that cannot be run."""


class ModelError(LitClipqError):
    """A model name, weights file or weight values that cannot be used."""


class DataError(LitClipqError):
    """Missing, damaged or contradictory data."""


class CalibrationError(LitClipqError):
    """Calibration that cannot give trustworthy scales."""
