"""Everything a user can put right, as one family of exceptions.

A command that meets one prints it as a single line and exits with code 2; anything else that escapes is a bug in moect
and keeps its traceback. A message says what is wrong, where, and what to do about it.

Two ends of a run have codes of their own, for whoever starts it again:

    69  a rank or a node was lost (EX_UNAVAILABLE of sysexits.h): start it again
    75  a signal asked it to stop, and there is a checkpoint of that step (EX_TEMPFAIL): start it again, later
"""


class MoectError(Exception):
    """Base of all errors that the user can put right."""

    exit_code = 2
    label = "error"


class ConfigError(MoectError):
    """A key, a value or a combination of values in the configuration."""


class DataError(MoectError):
    """A corpus, an evaluation text or a tokenizer that cannot be used as it is."""


class UnsupportedModelError(MoectError):
    """A model that the module cannot be appended to."""


class TrainingError(MoectError):
    """A run that cannot go on by itself."""


class RankLost(TrainingError):
    """A failure on one rank of which the others cannot be told: they wait for it, so it must end. Or other ranks do not
    answer."""

    exit_code = 69


class Stopped(TrainingError):
    """A signal asked the run to stop, and it did, with a checkpoint."""

    exit_code = 75
    label = "stopped"


class ForgettingError(TrainingError):
    """An old language lost more than it may, and the configuration says that the run ends then."""


class DispatchError(MoectError, ValueError):
    """Shapes, dtypes or indices that the expert kernels cannot take."""


class CheckpointError(MoectError):
    """A checkpoint that is missing, damaged, or of another run or base."""


class ExportError(MoectError):
    """A run that cannot be exported, or an export that failed its verification."""
