"""How many tokens to draft: from what drafting and verifying cost on this machine, and how many drafted tokens are accepted."""

from __future__ import annotations

import bisect
from collections import deque
import math
import statistics
from typing import Deque, Dict, List, Optional, Sequence, Tuple

# values of which the median is taken
_KEPT = 31
# plain steps that are timed before anything is drafted, and comparisons before anything is verified where they cost nothing
_FIRST = 4
# the shares of a text's time that may be lost to drafts in all, and to trials among them; and the plain steps that a text is
# taken to have at least
_LOST, _LOST_TO_TRIALS, _SHORTEST = 0.015, 0.01, 120
# what is taken for granted before it is measured: of a plain step, each further token of a verification, and a drafted one; of a
# token of the prompt, one that the draft reads
_FURTHER, _DRAFTED, _READ = 0.5, 0.3, 0.5
# what a median may be off by, in median deviations over the root of the number of values
_SURE = 2.3
# what a verification has taken that was measured once may be by so much more than it takes; n times, by an n-th of that. Else a
# number that was slow by chance would never be tried again
_BY_CHANCE = 0.06
# drafting has to be so much faster than plain steps
_MARGIN = 0.02
# tokens of the text that is to be written, where none has been; of a prompt that tells how fast prompts are read
_TEXT, _PROMPT = 64, 8
# a draft that would pay if verifying cost this share of what it is thought to is verified, to learn what it costs
_CHEAPER = 0.5
# of a plain step, what counts as nothing
_NOTHING = 0.005
# comparisons that a trial begins with, where the draft has text to read first
_BURST = 4
# of the share of accepted tokens: what each verification leaves of those before it
_FADING = 0.9
# plain steps that may pass until it is asked again
_PAUSE = 7
# no token is drafted that is wanted less often than this: what it costs is never known well enough
_WANTED = 0.05
# steps with a draft in a row, for each time that what is gained is as much as what a token takes
_IN_A_ROW = 16


class DraftLength:
    """Chooses the number of drafted tokens at which a token takes least time; none where that is no gain.

    With a share `a` of drafted tokens accepted, n drafted ones yield (1 - a**(n + 1)) / (1 - a) tokens a step (Leviathan et al.,
    2023, eq. 1). What a step takes is measured: medians of the last values, for verifying each number of tokens and for
    drafting one. Where it does not pay, one drafted token is now and then compared with the one that plain decoding writes, which
    costs no more than to draft it.

    What is lost against plain decoding is limited: a step is left out that could lose more than 1.5% of the time of the text, or
    of 120 plain steps, and what the text has gained.

    Args:
        most: drafted tokens at most.
    """

    def __init__(self, most: int):
        self.most = most
        self._verifying: Dict[int, Deque[float]] = {}
        # the numbers of tokens, in order, and their medians
        self._known: List[int] = []
        self._medians: Dict[int, float] = {}
        self._drafting: Deque[float] = deque(maxlen=_KEPT)
        self._reading: Deque[float] = deque(maxlen=_KEPT)
        self._prompt: Optional[float] = None
        self._texts: Deque[int] = deque(maxlen=_KEPT)
        self._accepted, self._judged, self._n_judged = 1.0, 2.0, 0
        # plain steps between two comparisons
        self._between = 0
        # plain steps that may follow the one that was chosen last, before there is anything to choose
        self.pause = 0
        # of this text, in seconds: its steps, what has been lost against plain ones, and that in trials alone
        self._spent = self._lost = self._lost_to_trials = 0.0
        self._is_trial = False
        self._since_plain = 0

    # what was measured, in seconds

    def prompt(self, n_tokens: int, seconds: float) -> None:
        """The model has read so many tokens of a prompt."""
        if n_tokens >= _PROMPT:
            self._prompt = seconds / n_tokens

    def verified(self, n_tokens: int, *seconds: float) -> None:
        """The model has evaluated so many tokens at once, each time: the last one of the text, and what was drafted after it."""
        times = self._verifying.setdefault(n_tokens, deque(maxlen=_KEPT))
        times.extend(seconds)
        if n_tokens not in self._medians:
            bisect.insort(self._known, n_tokens)
        self._medians[n_tokens] = statistics.median(times)

    def read(self, n_tokens: int, seconds: float) -> None:
        """The draft has read so many tokens of the text that it had not seen."""
        self._reading.append(seconds / n_tokens)

    def drafted(self, n_tokens: int, seconds: float) -> None:
        """The draft has made so many tokens."""
        self._drafting.append(seconds / n_tokens)

    def judged(self, n_drafted: int, n_accepted: int) -> None:
        """So many of the drafted tokens, which are the first ones, are those that the model has written."""
        self._n_judged += 1
        if n_accepted:
            self._between //= 2
        else:
            self.asked_in_vain()
        self._accepted = _FADING * self._accepted + n_accepted
        self._judged = _FADING * self._judged + n_accepted + (n_accepted < n_drafted)

    def asked_in_vain(self) -> int:
        """The draft had nothing to propose, or nothing that was right: asking it less often costs less. Plain steps until then."""
        self._between = min(_PAUSE, 2 * self._between + 1)
        return self._between

    def stepped(self, n_verified: int, n_tokens: int, seconds: float, drafting: float) -> None:
        """A step has taken so long, of which drafting took a part, and yielded so many tokens; so many drafted ones were verified."""
        # a plain one is none, however long it took; and one with a draft takes longer, unless others have left the machine since
        loss = seconds - n_tokens * min(seconds, self._plain_at_least()) if n_verified else drafting
        self._spent += seconds
        self._lost += loss
        self._lost_to_trials += self._is_trial * loss

    def _plain_at_least(self) -> float:
        """What a plain step takes, or less where few have been measured: else what was too long would look like a gain."""
        plain, times = self.verification_seconds(1), self._verifying.get(1)
        if not times:
            return plain
        return plain - _SURE * statistics.median(abs(seconds - plain) for seconds in times) / len(times) ** 0.5

    def wrote(self, n_tokens: int) -> None:
        """A text has ended that had so many tokens."""
        self._texts.append(n_tokens)
        # what is not made up for is lost to the next one
        self._lost = max(0.0, self._lost - _LOST * self._spent)
        self._lost_to_trials = max(0.0, self._lost_to_trials - _LOST_TO_TRIALS * self._spent)
        self._spent = 0.0

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
        """Of so many tokens at once: on a straight line between the numbers that were measured, and beyond them on the one from
        the first to the last, since those next to each other differ by what is noise."""
        known = self._known
        if n_tokens in self._medians:
            return self._seconds(n_tokens)
        if len(known) == 1:
            return self._seconds(known[0]) * (1 + _FURTHER * (n_tokens - 1)) / (1 + _FURTHER * (known[0] - 1))
        at = min(max(1, bisect.bisect(known, n_tokens)), len(known) - 1)
        low, high = known[at - 1 if n_tokens < known[-1] else 0], known[at]
        slope = max(0.0, (self._seconds(high) - self._seconds(low)) / (high - low))
        return self._seconds(high) + slope * (n_tokens - high)

    def _seconds(self, n_tokens: int) -> float:
        """Of a number that was measured."""
        return self._medians[n_tokens] * (1 - (n_tokens > 1) * _BY_CHANCE / len(self._verifying[n_tokens]))

    def measured(self) -> Dict[int, float]:
        """Seconds by number of tokens verified at once."""
        return dict(sorted(self._medians.items()))

    def choose(self, n_whole: int, n_late: int, most: int) -> Tuple[int, bool, bool]:
        """(tokens to draft now, whether after the whole text, whether to verify them).

        Args:
            n_whole: tokens that the draft has to read before it can go on from the whole text.
            n_late: the same for its last part.
            most: what there is room for.
        """
        self._is_trial, self.pause = False, 0
        n, whole, verified = self._choose(n_whole, n_late, min(most, self.most))
        self._since_plain = self._since_plain + 1 if n and verified else 0
        return n, whole, verified

    def _choose(self, n_whole: int, n_late: int, most: int) -> Tuple[int, bool, bool]:
        n_plain = len(self._verifying.get(1, ()))
        if most < 1 or n_plain < _FIRST:
            self.pause = _PAUSE if most < 1 else _FIRST - n_plain - 1
            return 0, False, False
        plain, draft = self.verification_seconds(1), self.draft_seconds
        time = max(self._spent, _SHORTEST * plain)
        spare = _LOST * time - self._lost
        # after as many steps with a draft as plain ones are kept (_FIRST at first, _KEPT in the end) one is plain, so that what
        # that takes stays known
        may_verify = self._since_plain < n_plain
        text = statistics.mean(self._texts) if self._texts else _TEXT
        # by steps: what nobody has measured is not far from what was
        further = [self.verification_seconds(n + 1) - plain for n in range(1, min(most, 2 * max(self._verifying)) + 1)]
        if may_verify:
            for n_tokens, whole in ((n_whole, True), (n_late, False))[: 2 - (n_whole == n_late)]:
                reading = self._seconds_to_read(n_tokens)
                n, gain = self._best(further, spare - reading)
                if reading < gain * text:
                    # the less is gained the more often a step is plain: what that takes decides, and others may change it
                    may_verify = self._since_plain <= _IN_A_ROW * gain / (plain - gain)
                    if may_verify:
                        return n, whole, True
                    break
        self._is_trial = True
        further, reading = further[:2], self._seconds_to_read(n_late)
        spare = min(spare, _LOST_TO_TRIALS * time - self._lost_to_trials) - reading
        would_pay = reading < self._best(further, math.inf, _CHEAPER)[1] * text
        costs_nothing = draft < _NOTHING * plain
        if would_pay and may_verify and not (costs_nothing and self._n_judged < _FIRST):
            n, _ = self._best(further, spare, _CHEAPER)
            if n:
                return n, False, True
        # what is saved up for a verification is not spent on comparing, unless that is next to nothing
        if (_BURST if n_late > 2 else 1) * draft <= spare and (costs_nothing or not would_pay):
            self.pause = self._between if may_verify and costs_nothing else 0
            return 1, False, False
        self.pause = _PAUSE if may_verify else 0
        return 0, False, False

    def _best(self, further: Sequence[float], spare: float, cheaper: float = 1.0) -> Tuple[int, float]:
        """(tokens to draft, seconds that are gained a token), where no more than is to spare is lost if none is accepted.

        Args:
            further: what verifying 1, 2, ... drafted tokens takes beyond a plain step, times `cheaper`.
        """
        plain, draft, a = self.verification_seconds(1), self.draft_seconds, min(self.acceptance, 0.999)
        best, found, tokens = 0, math.inf, 1.0
        for n, more in enumerate(further, 1):
            if n * draft + more > spare or (n > 1 and a**n < _WANTED):
                break
            tokens += a**n
            seconds = (n * draft + plain + cheaper * more) / tokens
            if seconds < found:
                best, found = n, seconds
        return best, plain / (1 + _MARGIN) - found

    def _seconds_to_read(self, n_tokens: int) -> float:
        if self._reading:
            return n_tokens * statistics.median(self._reading)
        return n_tokens * _READ * (self.verification_seconds(1) if self._prompt is None else self._prompt)
