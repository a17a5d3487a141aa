"""How many tokens to draft: from what drafting and verifying cost on this machine, and how many drafted tokens are accepted."""

from __future__ import annotations

from collections import deque
import statistics
from typing import Deque, Dict, Optional, Tuple

# values of which the median is taken
_KEPT = 31
# plain steps that are timed before anything is drafted
_FIRST = 4
# the share of the time that trials may cost, and what they may cost before that, in plain steps
_SHARE, _AT_ONCE = 0.01, 6
# drafts after which it is known whether they pay, and what may be saved up for trials from then on, unless one takes more
_LEARNT, _SAVED = 6, 2
# what is taken for granted before it is measured: of a plain step, each further token of a verification, and a drafted one; of a
# token of the prompt, one that the draft reads
_FURTHER, _DRAFTED, _READ = 0.5, 0.3, 0.5
# losses after which nothing is drafted until the share has made up for them, in plain steps
_AT_MOST = 8
# drafting has to be so much faster than plain steps
_MARGIN = 0.02
# tokens of a trial; of the text that is to be written, where none has been; of a prompt that tells how fast prompts are read
_TRIAL, _TEXT, _PROMPT = 2, 64, 8
# of the steps with a draft one in so many is plain, so that what a plain one takes stays known
_PLAIN_EVERY = 50
# of the share of accepted tokens: what each verification leaves of those before it
_FADING = 0.9


class DraftLength:
    """Chooses the number of drafted tokens at which a token takes least time; none where that is no gain.

    With a share `a` of drafted tokens accepted, n drafted ones yield (1 - a**(n + 1)) / (1 - a) tokens a step (Leviathan et al.,
    2023, eq. 1). What a step takes is measured: medians of the last values, for verifying each number of tokens and for
    drafting one. Where it does not pay, a draft is tried now and then: trials may lose the time of 6 plain steps at first, and 1%
    of the time spent.

    Args:
        most: drafted tokens at most.
    """

    def __init__(self, most: int):
        self.most = most
        self._verifying: Dict[int, Deque[float]] = {}
        self._medians: Dict[int, float] = {}
        self._drafting: Deque[float] = deque(maxlen=_KEPT)
        self._reading: Deque[float] = deque(maxlen=_KEPT)
        self._prompt: Optional[float] = None
        self._texts: Deque[int] = deque(maxlen=_KEPT)
        self._accepted, self._judged = 1.5, 2.0
        # what trials may lose now, and at most
        self._credit: Optional[float] = None
        self._saved = 0.0
        self._since_plain = self._n_judged = 0

    # what was measured, in seconds

    def prompt(self, n_tokens: int, seconds: float) -> None:
        """The model has read so many tokens of a prompt."""
        if n_tokens >= _PROMPT:
            self._prompt = seconds / n_tokens

    def verified(self, n_tokens: int, seconds: float) -> None:
        """The model has evaluated so many tokens at once: the last one of the text, and what was drafted after it."""
        times = self._verifying.setdefault(n_tokens, deque(maxlen=_KEPT))
        times.append(seconds)
        self._medians[n_tokens] = statistics.median(times)

    def read(self, n_tokens: int, seconds: float) -> None:
        """The draft has read so many tokens of the text that it had not seen."""
        self._reading.append(seconds / n_tokens)

    def drafted(self, n_tokens: int, seconds: float) -> None:
        """The draft has made so many tokens."""
        self._drafting.append(seconds / n_tokens)

    def judged(self, n_drafted: int, n_accepted: int) -> None:
        """The model has accepted so many of the drafted tokens, which are the first ones."""
        self._n_judged += 1
        self._accepted = _FADING * self._accepted + n_accepted
        self._judged = _FADING * self._judged + n_accepted + (n_accepted < n_drafted)

    def stepped(self, n_drafted: int, n_tokens: int, seconds: float) -> None:
        """A step, draft and all, has taken so long and yielded so many tokens."""
        if self._credit is not None:
            # a plain one is none, however long it took
            loss = seconds - n_tokens * self.verification_seconds(1) if n_drafted else 0.0
            self._credit = min(self._credit + _SHARE * seconds - loss, self._saved)

    def wrote(self, n_tokens: int) -> None:
        """A text has ended that had so many tokens."""
        self._texts.append(n_tokens)

    # what follows

    @property
    def acceptance(self) -> float:
        """Of late, the share of the drafted tokens that are accepted where those before them are."""
        return self._accepted / self._judged

    @property
    def draft_seconds(self) -> float:
        """Of one drafted token; a guess where none has been drafted."""
        return statistics.median(self._drafting) if self._drafting else _DRAFTED * self.verification_seconds(1)

    def verification_seconds(self, n_tokens: int) -> float:
        """Of so many tokens at once: on a straight line between the numbers that were measured, and beyond them."""
        times = self._medians
        if n_tokens in times:
            return times[n_tokens]
        known = sorted(times)
        if len(known) == 1:
            return times[known[0]] * (1 + _FURTHER * (n_tokens - 1)) / (1 + _FURTHER * (known[0] - 1))
        at = max(1, next((i for i, n in enumerate(known) if n > n_tokens), len(known) - 1))
        low, high = known[at - 1], known[at]
        slope = max(0.0, (times[high] - times[low]) / (high - low))
        return times[high] + slope * (n_tokens - high)

    def measured(self) -> Dict[int, float]:
        """Seconds by number of tokens verified at once."""
        return dict(sorted(self._medians.items()))

    def choose(self, n_whole: int, n_late: int, most: int) -> Tuple[int, bool]:
        """(tokens to draft now, whether after the whole text).

        Args:
            n_whole: tokens that the draft has to read before it can go on from the whole text.
            n_late: the same for its last part.
            most: what there is room for.
        """
        found = self._choose(n_whole, n_late, min(most, self.most))
        self._since_plain = self._since_plain + 1 if found[0] else 0
        return found

    def _choose(self, n_whole: int, n_late: int, most: int) -> Tuple[int, bool]:
        if most < 1 or len(self._verifying.get(1, ())) < _FIRST:
            return 0, False
        plain = self.verification_seconds(1)
        if self._credit is None:
            self._credit = self._saved = _AT_ONCE * plain
        if self._credit < -_AT_MOST * plain or self._since_plain >= _PLAIN_EVERY:
            return 0, False
        if self._drafting and len(self._verifying) > 1:
            # by steps: what nobody has measured is not far from what was
            draft, a = self.draft_seconds, min(self.acceptance, 0.999)
            seconds, best = min(
                ((n * draft + self.verification_seconds(n + 1)) * (1 - a) / (1 - a ** (n + 1)), n)
                for n in range(1, min(most, 2 * max(self._verifying)) + 1)
            )
            gain = plain / (1 + _MARGIN) - seconds
            text = statistics.mean(self._texts) if self._texts else _TEXT
            for n_tokens, whole in ((n_whole, True), (n_late, False)):
                if self._seconds_to_read(n_tokens) < gain * text:
                    return best, whole
        n = min(_TRIAL, most)
        loss = self._seconds_to_read(n_late) + n * self.draft_seconds + self.verification_seconds(n + 1) - plain
        self._saved = max((_AT_ONCE if self._n_judged < _LEARNT else _SAVED) * plain, loss)
        self._credit = min(self._credit, self._saved)
        return (n if loss <= self._credit else 0), False

    def _seconds_to_read(self, n_tokens: int) -> float:
        if self._reading:
            return n_tokens * statistics.median(self._reading)
        return n_tokens * _READ * (self.verification_seconds(1) if self._prompt is None else self._prompt)
