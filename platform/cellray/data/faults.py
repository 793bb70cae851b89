"""Requests that fail on their way, and trying again.

What a file system's client raises is told apart: an answer (there is no such file, access denied)
stands; a fault that may pass (an error of the server, a connection that broke) is worth another try.
"""

import logging
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

DEADLINE = 300.0
"""Seconds after which a call is not tried again."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


def retried(url: str, call: Callable[[], T]) -> T:
    """What `call` returns, which must do the same when it is done again. `url` is what it is about.

    A fault that may pass is tried again, with jitter, until DEADLINE has passed, at least once.
    Then ConnectionError says how often it was tried and why the last one failed.
    """
    begun, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return call()
        except _faults() as error:
            if not _passes(error):
                raise
            spent = time.monotonic() - begun
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            if tries > 1 and spent > DEADLINE:
                raise ConnectionError(
                    f"{url} could not be reached: {tries} tries in {spent:.0f} s, the last one "
                    f"failed with {said}. Check the network and the service, then run this again."
                ) from error
            logger.warning("%s: try %d failed after %.0f s, trying again (%s)", url, tries, spent, said)
        pause(tries)


def pause(number: int) -> None:
    """Wait a random time, on average longer before each further try, 20 s at most."""
    time.sleep(random.random() * min(20.0, 0.2 * 2.0**number))


FAULTS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": (
        "HTTPClientError",
        "ConnectionError",
        "IncompleteReadError",
        "FlexibleChecksumError",
    ),
    "botocore.parsers": ("ResponseParserError",),
    "gcsfs.retry": ("HttpError", "ChecksumError"),
}
"""What clients raise, beside OSError, when a request failed on its way."""


def _faults() -> tuple[type[Exception], ...]:
    """The exceptions of FAULTS. Only clients that are imported already can raise theirs."""
    found: list[type[Exception]] = [OSError]
    for module, names in FAULTS.items():
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names]
    return tuple(found)


FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Answers, not faults."""
PASSING = {"RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "NoSuchUpload"}
"""Error codes of S3 that another try does away with, though their status says that the request was bad."""


def _passes(error: Exception) -> bool:
    """Whether the fault may be gone the next time."""
    status, code = answer(error)
    if code in PASSING:
        return True
    if isinstance(error, FINAL) or str(error).startswith("Forbidden"):  # as gcsfs puts it
        return False
    # 409: another conditional PUT of the same name was on its way.
    return status is None or status in (408, 409, 429) or (status >= 500 and status != 501)


def answer(error: BaseException) -> tuple[int | None, str]:
    """Status and error code with which a server refused, as far as the error tells."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
    code = str(getattr(error, "code", "")) if type(error).__module__.startswith("gcsfs") else ""
    return (int(code), "") if code.isdigit() else (None, "")
