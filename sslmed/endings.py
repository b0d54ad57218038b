"""How a command that failed ends: a word to the person at the terminal, and an exit code."""

import errno
import os
import sys
import traceback

from sslmed import __version__
from sslmed.config import DiskError, ElsewhereError, MissingDependencyError, SslmedError
from sslmed.console import tag

MOST_LINES = 6  # of an error
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "sklearn": "scikit-learn", "yaml": "PyYAML"}


def of(error: BaseException) -> int:
    """The exit code of an error, once it has been told on standard error."""
    if isinstance(error, KeyboardInterrupt):
        return interrupted()
    if isinstance(error, ElsewhereError):
        return error.exit_code
    if isinstance(error, SslmedError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return _fail(f"cannot write: {error}", DiskError.exit_code)
    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in ("", "sslmed"):
        return _bug(error)
    missing = DISTRIBUTIONS.get(package, package)
    return _fail(
        f"this needs {missing}, which is not installed: python -m pip install {missing}",
        MissingDependencyError.exit_code,
    )


def interrupted() -> int:
    """The exit code of a Ctrl-C."""
    return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print("\n".join(f"{tag()}error: {message}".splitlines()[:MOST_LINES]), file=sys.stderr)
    return code


def _bug(error: BaseException) -> int:
    traceback.print_exception(error)
    print(f"error: this is a bug in sslmed {__version__}; please report it with the lines above", file=sys.stderr)
    return SslmedError.exit_code
