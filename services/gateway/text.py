"""Token ids to streamed text: whole characters only, stop strings found across token borders and never shown."""

from __future__ import annotations

from collections.abc import Sequence

from winnow.workers.model.tokenizer import IncrementalDetokenizer, Tokenizer


class StopMatcher:
    """Holds back text that may be the beginning of a stop string until it is known not to be one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, a stop string was found). After True nothing more may be pushed."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = self._longest_start()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        shown, self._held = self._held, ""
        return shown

    def _longest_start(self) -> int:
        """Length of the longest end of the held text that some stop string begins with."""
        longest = max((len(s) for s in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0


class TextStream:
    """Detokenises one answer."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._matcher = StopMatcher(stops)

    def push(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """(text to show now, a stop string ended the answer)."""
        return self._matcher.push(self._detokenizer.push(token_ids))

    def finish(self) -> tuple[str, bool]:
        """The rest of the text when the answer ended by itself; a stop string may still be completed by it."""
        shown, stopped = self._matcher.push(self._detokenizer.flush())
        return (shown, True) if stopped else (shown + self._matcher.flush(), False)
