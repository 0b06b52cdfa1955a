"""What lies in the user's own raw data, without reading it: enough to notice that it changed."""

import hashlib
import os
from pathlib import Path

from pipeline.config import Data


def listing(options: Data) -> str | None:
    """A hash over path, size and time of change of every file under `data.root`, for a folder of images or an .npz file.

    None for the published data sets: their content never changes. A root that is missing gives the hash of nothing; reading it
    says what is wrong.
    """
    root = Path(options.root)
    if options.name != "folder" and not root.is_file():
        return None
    digest = hashlib.sha256()
    found = [root] if root.is_file() else sorted(Path(top, name) for top, _, names in os.walk(root) for name in names)
    for path in found:
        state = path.stat()
        digest.update(f"{path.relative_to(root)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
