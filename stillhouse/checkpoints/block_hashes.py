"""SHA-256 of long files block by block, so that a few can be compared at every start, and all on request."""

import random
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

BLOCK = 1 << 22  # bytes
AT_START = 4  # blocks of a file; a shorter file is compared whole
_DIGITS = 32  # of a block's hash, which is to find damage


class BlockHashes:
    """SHA-256 of bytes that are added piece by piece, as a whole and of each block of `BLOCK` bytes.

    Attributes:
        size: the number of bytes so far.
    """

    def __init__(self):
        self._whole, self._block = sha256(), sha256()
        self._full: list[str] = []
        self.size = 0

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        data = memoryview(data).cast("B")
        self._whole.update(data)
        while len(data):
            part = data[: BLOCK - self.size % BLOCK]
            self._block.update(part)
            self.size += len(part)
            data = data[len(part) :]
            if self.size % BLOCK == 0:
                self._full.append(self._block.hexdigest()[:_DIGITS])
                self._block = sha256()

    @property
    def whole(self) -> str:
        """Hash of all bytes, 64 hex digits."""
        return self._whole.hexdigest()

    @property
    def digest(self) -> bytes:
        """Hash of all bytes, 32 bytes."""
        return self._whole.digest()

    @property
    def blocks(self) -> list[str]:
        """Hash of each block, 32 hex digits; none where the bytes are so few that they are compared whole."""
        if self.size <= AT_START * BLOCK:
            return []
        return self._full + ([self._block.hexdigest()[:_DIGITS]] if self.size % BLOCK else [])


def hash_range(path: Path, offset: int, size: int) -> str:
    """Hash `size` bytes of a file from `offset` on: SHA-256, 64 hex digits."""
    digest = sha256()
    with open(path, "rb") as file:
        file.seek(offset)
        while size and (block := file.read(min(size, BLOCK))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def unchanged(
    path: Path, offset: int, size: int, whole: str, blocks: Sequence[str] = (), *, everything: bool = False
) -> bool:
    """Compare bytes of a file with their hashes: few bytes whole, many in `AT_START` blocks, others each time.

    Args:
        path: the file.
        offset: of the first byte.
        size: the number of bytes.
        whole: SHA-256 of all of them, 64 hex digits.
        blocks: `BlockHashes.blocks`. A long file without them, of an earlier version, is taken as it is.
        everything: whether to compare all bytes in any case.

    Returns:
        Whether all that was compared is equal.
    """
    if everything or size <= AT_START * BLOCK:
        return hash_range(path, offset, size) == whole
    if not blocks:
        return True
    count = -(-size // BLOCK)
    if len(blocks) != count:
        return False
    # Of the system's random numbers: the program's own stay as they are.
    for number in sorted(random.SystemRandom().sample(range(count), AT_START)):
        start = number * BLOCK
        if hash_range(path, offset + start, min(BLOCK, size - start))[:_DIGITS] != blocks[number]:
            return False
    return True
