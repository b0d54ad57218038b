"""The base of every settings class, and the errors with their exit codes (sysexits.h where it has one)."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Settings that are read, never changed: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SslmedError(Exception):
    """A failure that the user can mend. The message says what was given, what is allowed and what to do."""

    exit_code = 1
    agreed = False  # all processes of a training have come to it together


class UsageError(SslmedError):
    """A wrong option or recipe, or a resume that would change the recipe."""

    exit_code = 2


class TrainingAborted(SslmedError):
    """Training stopped itself: non-finite loss or collapsed embeddings."""

    exit_code = 3
    agreed = True


class DataError(SslmedError):
    """Bad data, labels or checkpoint, a modality that does not fit, leakage."""

    exit_code = 65


class MissingInputError(SslmedError):
    """An input path does not exist."""

    exit_code = 66


class MissingDependencyError(SslmedError):
    """An optional library is not installed."""

    exit_code = 69


class OutputExistsError(SslmedError):
    """The output is there already and would be overwritten."""

    exit_code = 73


class DiskError(SslmedError):
    """Writing failed: disk full, read-only or an I/O error. What was there before is untouched."""

    exit_code = 74


class TemporaryError(SslmedError):
    """Try again later: another process holds the run."""

    exit_code = 75


class Interrupted(SslmedError):
    """A signal asked for the end; the checkpoint is saved. Exit code 128 + signal number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class ElsewhereError(SslmedError):
    """Another process of the same training failed, and tells it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
