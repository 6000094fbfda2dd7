"""Contains: launches a SandboxSpec and reports an Outcome."""
