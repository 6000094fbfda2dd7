"""Describes how each userspace builder is driven: argv, environment, files. Starts nothing."""
