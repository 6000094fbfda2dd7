"""The docker backend: containers of an Engine on this host."""
