"""Errors that end a command: each is one message for the user and one exit code for scripts."""


class HalfbyteError(Exception):
    """A failure that the user can act on. Only its message is shown, without a traceback."""

    exit_code = 1


class RecipeError(HalfbyteError, ValueError):
    """The recipe or an option, the model it names or the output folder cannot be used as requested."""

    exit_code = 2


class DataError(HalfbyteError, ValueError):
    """The training images or their captions cannot be used."""

    exit_code = 3


class HubError(HalfbyteError, RuntimeError):
    """The Hub cannot be reached, or refuses a request."""

    exit_code = 4


class LaunchError(HalfbyteError, RuntimeError):
    """The launcher started the processes in a way that would not train as the user expects."""

    exit_code = 5


class OutOfMemory(HalfbyteError):
    """Device or host memory is full. The last checkpoint is intact."""

    exit_code = 6


class DiskError(HalfbyteError):
    """A file cannot be written: the disk is full or over its quota, or the folder is read-only or gone."""

    exit_code = 6


class ExportError(HalfbyteError):
    """The export differs from the trained model, or stock diffusers cannot load it. Earlier exports are kept."""

    exit_code = 7


class NonFiniteError(HalfbyteError):
    """The loss, gradients or weights are NaN or infinite. The last checkpoint is intact."""

    exit_code = 8


class ProcessLost(HalfbyteError):
    """Another process of the run ended or stopped responding. The last checkpoint is intact."""

    exit_code = 9
