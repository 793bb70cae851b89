"""What a file is, told from its content: so that a store knows what it was made from."""

import hashlib
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cellray.data import storage
from cellray.data.faults import retried

TAGS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5", "crc32c")
"""Keys under which object stores tell a checksum or version of a file."""
PIECE = 8 << 20
"""Bytes hashed at a time."""


def identity(url: str) -> dict[str, Any]:
    """`bytes`, and `sha256` of the content, of a file or of all files of a folder.

    An object store's own checksum stands in for the content as `tag`, where it has one.
    `{"missing": True}` where there is nothing. Local content is read once, at the disk's speed.
    """
    fs, path = storage.locate(url)
    if not storage.exists(url):
        return {"missing": True}
    if not retried(url, lambda: fs.isdir(path)):
        return _file(fs, url, retried(url, lambda: fs.info(path)))
    every = retried(url, lambda: fs.find(path, detail=True))
    found = {name[len(path) :].lstrip("/"): info for name, info in every.items()}
    parts = {name: _file(fs, storage.join(url, name), found[name]) for name in sorted(found)}
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"{name}\t{part.get('sha256', part.get('tag'))}\n".encode())
    return {"bytes": sum(part["bytes"] for part in parts.values()), "sha256": digest.hexdigest()}


def _file(fs: fsspec.AbstractFileSystem, url: str, info: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(fs, LocalFileSystem):
        for tag in TAGS:
            if info.get(tag):
                return {"bytes": int(info["size"]), "tag": str(info[tag]).strip('"')}
    digest = hashlib.sha256()
    size = 0
    with storage.open_blocks(url) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}
