"""Arrays that grow on disk: a value or more for every document of a corpus, without holding them in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moect.errors import DataError


class Columns:
    """Columns of numbers, one file each.

    Args:
        folder: an empty folder of its own.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Add to a column; its first values decide its dtype.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        try:
            if name not in self._files:
                self._files[name] = (self.folder / name).open("wb"), values.dtype
            stream, dtype = self._files[name]
            stream.write(np.ascontiguousarray(values, dtype=dtype).data)
        except OSError as error:
            raise self._full(error) from error

    def read(self, name: str) -> np.ndarray:
        """All of a column, mapped into memory as it is needed; nothing may be appended to it afterwards."""
        stream, dtype = self._files[name]
        try:
            stream.close()
        except OSError as error:  # what was buffered is written now
            raise self._full(error) from error
        if not (self.folder / name).stat().st_size:
            return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
        return np.asarray(np.memmap(self.folder / name, dtype=dtype, mode="r"))  # still mapped, and faster to slice

    def close(self) -> None:
        """Close what is open."""
        for stream, _ in self._files.values():
            stream.close()

    def _full(self, error: OSError) -> DataError:
        return DataError(f"{self.folder}: cannot be written ({error.strerror or error}); free or choose another place")
