"""The old place of `flaxdiff.samplers.churn`."""
from .churn import EDMSampler

__all__ = ["EDMSampler"]
