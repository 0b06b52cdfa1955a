"""Published files from the network: of a known size at most, checked by their sums, and only then put on the disk.

An archive gives up the files that are asked for by name and nothing else: a path in it that leads elsewhere, or a link, is never
followed, and nothing is unpacked that is longer than it may be.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

TIMEOUT = 60  # seconds without a byte
GZIP = 31  # zlib's number for the gzip form


def fetch(url: str, size: int, digest: str) -> bytes:
    """The file at `url`. `ValueError` where it has not `size` bytes or its sum is not `digest`, "sha256:..." or "md5:...";
    `OSError` or `HTTPException` where it cannot be had."""
    print(f"downloading {url} ({size / 1e6:.0f} MB)", flush=True)
    with urlopen(Request(url, headers={"User-Agent": "winnow"}), timeout=TIMEOUT) as answer:
        content = answer.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{url} has {'more' if len(content) > size else len(content)} bytes than {size}, which it should have")
    return verified(content, digest, url)


def read(path: Path, digest: str) -> bytes:
    """A file whose sum is `digest`; `ValueError` where it is another, `OSError` where it cannot be read."""
    return verified(path.read_bytes(), digest, path)


def verified(content: bytes, digest: str, where: Any) -> bytes:
    """`content`, whose sum is `digest`; else `ValueError`."""
    algorithm, _, expected = digest.partition(":")
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(f"{where} has the {algorithm} {found}, not {expected}")
    return content


def inflated(content: bytes, size: int) -> bytes:
    """What a gzip file holds; `ValueError` where that is not `size` bytes."""
    try:
        whole = zlib.decompressobj(GZIP).decompress(content, size + 1)
    except zlib.error as error:
        raise ValueError(f"it is no gzip file ({error})") from None
    if len(whole) != size:
        raise ValueError(f"it does not hold {size} bytes")
    return whole


def members(archive: bytes, names: Iterable[str], limit: int) -> dict[str, bytes]:
    """The files `names` of a .tar.gz; `ValueError` where one is not in it, is no plain file, or has more than `limit` bytes."""
    wanted, found = set(names), {}
    try:
        with tarfile.open(fileobj=BytesIO(archive), mode="r:gz") as tar:
            for member in tar:
                if member.name not in wanted:
                    continue
                content = tar.extractfile(member) if member.isreg() and member.size <= limit else None
                if content is None:
                    raise ValueError(f"{member.name} in the archive is no plain file of at most {limit} bytes")
                found[member.name] = content.read()
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise ValueError(f"it is no archive ({error})") from None
    if missing := wanted - found.keys():
        raise ValueError(f"the archive lacks {', '.join(sorted(missing))}")
    return found
