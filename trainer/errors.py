"""What a run ends with when it cannot go on: one message for the user, one exit code for scripts."""


class HalfbyteError(Exception):
    """A failure the user can act on; shown as its message alone, without a traceback."""

    exit_code = 1


class RecipeError(HalfbyteError, ValueError):
    """The recipe, the model it names or the output folder cannot be used as asked."""

    exit_code = 2


class DataError(HalfbyteError, ValueError):
    """The training pictures or their captions cannot be used."""

    exit_code = 3


class HubError(HalfbyteError, RuntimeError):
    """The Hub is out of reach, or refuses what was asked of it."""

    exit_code = 4


class LaunchError(HalfbyteError, RuntimeError):
    """The launcher's environment asks for something that would not train as the user expects."""

    exit_code = 5


class OutOfMemory(HalfbyteError):
    """The device is full; the last checkpoint is untouched."""

    exit_code = 6


class ExportError(HalfbyteError):
    """What was exported is not what was trained, or stock diffusers does not take it; earlier exports are kept."""

    exit_code = 7
