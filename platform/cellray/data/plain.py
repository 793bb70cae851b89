"""Text files that a setting names, plain or gzipped."""

import gzip
import io
import zlib

from cellray.data import storage


def read_plain(url: str, *, most: int, setting: str, wanted: str, kind: str) -> bytes:
    """What the file at `url` holds, unpacked.

    ValueError where it is missing, damaged, or unpacked larger than `most` bytes: `setting` named it, it
    should be `wanted`, and a larger one is no `kind`.
    """
    try:
        data = storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{setting}: there is no file {url}. Give {wanted}.") from None
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(most + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{url} is a damaged gzip file: {error}") from error
    if len(data) > most:
        raise ValueError(f"{url} has more than {most:,} bytes, unpacked: it is no {kind}")
    return data
