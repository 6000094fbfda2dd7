"""What can be wrong with what a builder is asked for. ``runner.errors`` draws the whole tree."""

from policies.errors import UsageError


class DockerfileInvalid(UsageError):
    """A Dockerfile outside the grammar, found before anything was started."""

    code = "dockerfile-invalid"
    default_advice = "Mend the line; nothing was started."


class StageUnknown(UsageError):
    """``--target`` names no stage of the Dockerfile."""

    code = "stage-unknown"
    default_advice = "Name a stage that stands after AS, or leave --target out for the last one."


class BuilderUnknown(UsageError):
    """No adapter has this name."""

    code = "builder-unknown"
    default_advice = "runner builder list"
