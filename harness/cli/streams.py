"""Standard output and error that end no work: what cannot be written to them is dropped, and remembered."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

CLOSED = (errno.EPIPE, errno.EBADF)  # whoever reads has enough, or nobody was meant to read


class Lasting(io.FileIO):
    """A file that takes everything. After the first error nothing more is written; `lost` is that error."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
        return memoryview(data).nbytes


def install() -> None:
    """Make sys.stdout and sys.stderr lasting. A descriptor that is closed is first opened on the null device, so that
    no file of ours gets its number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: TextIO | None) -> TextIO:
    """A lasting stream with the encoding of `stream`; the null device in place of none."""
    if isinstance(stream, io.TextIOWrapper):
        with suppress(OSError):
            stream.flush()
        try:
            raw = Lasting(stream.fileno(), "wb", closefd=False)
        except io.UnsupportedOperation:  # in memory, and behind no descriptor
            return stream
        encoding, at_once, lines = stream.encoding, stream.write_through, stream.line_buffering
    elif stream is None:
        raw, encoding, at_once, lines = Lasting(os.devnull, "wb"), "utf-8", False, False
    else:
        return stream
    # backslashreplace: for terminals that know few letters
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", None, lines, at_once)


def lost(stream: TextIO) -> OSError | None:
    """Why something written to a stream did not arrive; None where everything did."""
    with suppress(OSError, ValueError):
        stream.flush()
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, Lasting) else None


def full(stream: TextIO) -> str | None:
    """The reason where a stream lost what somebody wanted to read: a full disk, not a reader that has closed it."""
    error = lost(stream)
    return None if error is None or error.errno in CLOSED else error.strerror or type(error).__name__
