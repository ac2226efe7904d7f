"""Sparse and mixture-of-experts architectures: trained, sharded, measured."""

__version__ = "0.1.0"
