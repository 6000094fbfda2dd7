"""Decides how strongly a build is contained and what it may reach.

Pure: no process, no network, no clock. This package is the lowest of the four,
so the words that all of them share (errors, digests, image references) live here.
"""
