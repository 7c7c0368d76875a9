"""Models that are being served: whose requests a batch is of, and the plug-in of vLLM."""

from ..taps.batch import requests_of_batch

__all__ = ["requests_of_batch"]
