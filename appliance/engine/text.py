"""From token bytes to text that may be shown: incremental UTF-8, and stop strings held back until they are certain.

Costs per token are of the size of the new text and the longest stop string, never of the whole answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """One choice's text. Nothing that `feed` returned is ever taken back; no part of a stop string is ever returned.

    The stop string that begins first ends the text; bytes that are no UTF-8 become U+FFFD.
    """

    __slots__ = ("_decoder", "_held", "_stops", "stopped")

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stops)
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """The text that has become certain with these bytes."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest: nothing is to come that could complete a stop string or a character."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        found = min((i for s in self._stops if (i := text.find(s)) >= 0), default=-1)
        # A stop string that begins earlier may still be on its way: everything from its first letter on is held.
        keep = min((self._partial(text, s) for s in self._stops), default=len(text))
        if 0 <= found <= keep:
            self.stopped, self._held = True, ""
            return text[:found]
        self._held = text[keep:]
        return text[:keep]

    @staticmethod
    def _partial(text: str, stop: str) -> int:
        """Where the longest end of `text` begins that is a proper beginning of `stop`."""
        for start in range(max(0, len(text) - len(stop) + 1), len(text)):
            if stop.startswith(text[start:]):
                return start
        return len(text)
