"""The local backend: runsc directly."""
