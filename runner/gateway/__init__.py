"""The door: the only thing that a sandbox can reach, and the only way that anything leaves it."""
