"""From token bytes to text that may be shown: incremental UTF-8, and stop strings held back until they are certain.

What `feed` and `finish` return, put together, is the decoded text up to where the earliest stop string begins; of two
that overlap, the one that begins first ends the text, also if the other is complete earlier. A feed costs the length of
the new text times the number of stop strings, whatever was fed before. Knows bytes and characters, not tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """One choice's text. Nothing returned is ever taken back, and no part of a stop string is ever returned.

    Bytes that are no UTF-8 become U+FFFD. `stopped` is True from the moment a stop string is certain; `stop` is that
    string then.
    """

    __slots__ = ("_cut", "_decoder", "_held", "_matchers", "_read", "stop", "stopped")

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_Matcher(stop) for stop in dict.fromkeys(stops) if stop]
        self._held = ""  # decoded, but it may belong to a stop string
        self._read = 0  # characters decoded until now
        self._cut: int | None = None  # where the earliest complete stop string begins
        self.stopped = False
        self.stop = ""

    def feed(self, piece: bytes) -> str:
        """The text that has become certain with these bytes; nothing after the stop."""
        return "" if self.stopped else self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest: nothing is to come that could complete a character or a stop string."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        if self._cut is not None:
            keep = len(self._held) - (self._read - self._cut)
            self.stopped, self._held = True, self._held[:keep]
        text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        if not self._matchers:
            return new
        self._match(new)
        start = self._read - len(self._held)  # position of the first held character
        self._held += new
        self._read += len(new)
        pending = min(self._read - m.length for m in self._matchers)
        certain = pending if self._cut is None else min(pending, self._cut)
        text, self._held = self._held[: certain - start], self._held[certain - start :]
        if certain == self._cut:
            self.stopped, self._held = True, ""
        return text

    def _match(self, new: str) -> None:
        """Moves every matcher over `new`; the earliest begin of a complete stop string becomes the cut."""
        for matcher in self._matchers:
            end = matcher.find(new)
            if end is not None:
                begin = self._read + end - len(matcher.stop)
                if self._cut is None or begin < self._cut:
                    self._cut, self.stop = begin, matcher.stop


class _Matcher:
    """Knuth, Morris and Pratt's search for one stop string in text that comes in pieces."""

    __slots__ = ("_borders", "length", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0  # of the longest end of the text so far that begins the stop string
        self._borders = [0]  # of the string's first i + 1 characters; made only as far as a text ever matches

    def find(self, new: str) -> int | None:
        """Where in `new` the first stop string ends, if it does."""
        stop, length = self.stop, self.length
        if not length and stop[0] not in new:
            return None
        for at, character in enumerate(new, 1):
            while length and stop[length] != character:
                length = self._border(length)
            length += stop[length] == character
            if length == len(stop):
                self.length = 0  # the first one counts; matching on would find later ones only
                return at
        self.length = length
        return None

    def _border(self, length: int) -> int:
        """The longest proper end of the first `length` characters that also begins them."""
        borders, stop = self._borders, self.stop
        while len(borders) < length:
            border, character = borders[-1], stop[len(borders)]
            while border and stop[border] != character:
                border = borders[border - 1]
            borders.append(border + (stop[border] == character))
        return borders[length - 1]
