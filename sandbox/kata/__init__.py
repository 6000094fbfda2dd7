"""Kata: what a host needs for it, looked at without starting a guest."""
