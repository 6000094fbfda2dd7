"""Builds container images from source that nobody trusts: ``runner submit --untrusted``."""

__version__ = "0.1.0"
