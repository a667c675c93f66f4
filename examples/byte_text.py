"""Real text as bytes for train_moe_lm.py: Python's own standard library, or any file or folder.

Each rank reads the same bytes and draws its own windows from them; nothing is tokenized, a byte
is a token.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

NUM_BYTE_VALUES = 256
MAX_BYTES = 8 * 2**20


def standard_library() -> Path:
    """Where this Python keeps the sources of its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> Tensor:
    """The text under path, [num_bytes] uint8, at most max_bytes.

    A folder gives all its text files (those without a zero byte), sorted by path, without
    site-packages and hidden or __pycache__ folders; in the standard library only the .py files.

    Raises:
        ValueError: nothing to read there.
    """
    if path.is_dir():
        pattern = "*.py" if path == standard_library() else "*"
        files = sorted(file for file in path.rglob(pattern) if _is_wanted(file, path))
    else:
        files = [path] if path.exists() else []
    content = bytearray()
    for file in files:
        if len(content) >= max_bytes:
            break
        part = file.read_bytes()
        if b"\0" not in part:
            content += part
    if not content:
        raise ValueError(f"no text under {path}, expected a text file or a folder with some.")
    return torch.frombuffer(content[:max_bytes], dtype=torch.uint8)


def _is_wanted(file: Path, folder: Path) -> bool:
    folders = file.relative_to(folder).parts[:-1]
    is_hidden = any(part.startswith(".") for part in (*folders, file.name))
    return file.is_file() and not is_hidden and not {"site-packages", "__pycache__"} & {*folders}


class Windows:
    """Draws micro-batches of random windows; equal seeds give equal micro-batches.

    Args:
        text: [num_bytes] uint8.
        num_windows: windows of a micro-batch.
        length: bytes of a window.
        seed: a rank's own.
    Raises:
        ValueError: the text is shorter than one window and the byte that follows it.
    """

    def __init__(self, text: Tensor, *, num_windows: int, length: int, seed: int) -> None:
        if len(text) <= length:
            raise ValueError(f"the text has {len(text)} bytes, expected more than {length}.")
        self._text = text
        self._num_windows = num_windows
        self._within = torch.arange(length + 1)
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """(bytes, the byte that follows each), both [num_windows, length] int64."""
        last_start = len(self._text) - len(self._within)
        starts = torch.randint(last_start + 1, (self._num_windows, 1), generator=self._generator)
        windows = self._text[starts + self._within].long()
        return windows[:, :-1], windows[:, 1:]
