"""How many tokens are drafted, on a machine whose times are made up: what it loses where drafts do not pay, and gains where they do."""

from allocmoe_edge.draft_length import DraftLength
import numpy as np
import pytest

PLAIN = 0.05


class Machine:
    """Writes texts with a draft of which each token is accepted with probability `acceptance`.

    more: what each further token of a verification costs, and draft: what a drafted one does, in plain steps. noise: spread of
    all times.
    """

    def __init__(self, acceptance, more, draft, noise=0.1, seed=0):
        self.acceptance, self.more, self.draft, self.noise = acceptance, more, draft, noise
        self.length, self.rng = DraftLength(16), np.random.default_rng(seed)
        self.seconds, self.n_tokens = 0.0, 0

    def _time(self, plain_steps):
        return PLAIN * plain_steps * (1 + self.noise * abs(self.rng.standard_normal()))

    def write(self, n_tokens, n_prompt=20):
        """Returns what a plain step takes on average, over what a token has taken: above 1 it was faster."""
        begin = self.seconds, self.n_tokens
        unread = n_prompt
        self.length.prompt(n_prompt, self._time(0.2 * n_prompt))
        while self.n_tokens - begin[1] < n_tokens:
            n, whole = self.length.choose(unread, min(unread, 32), 100)
            step = 0.0
            if n:
                n_read = unread if whole else min(unread, 32)
                if n_read > 2:
                    seconds = self._time(0.2 * self.draft * n_read)
                    self.length.read(n_read, seconds)
                    step += seconds
                seconds = self._time(n * self.draft)
                self.length.drafted(n, seconds)
                step += seconds
                unread = 1
            seconds = self._time(1 + self.more * n)
            self.length.verified(n + 1, seconds)
            step += seconds
            n_accepted = int(np.argmin([*(self.rng.random(n) < self.acceptance), False]))
            if n:
                self.length.judged(n, n_accepted)
            else:
                unread += 1
            self.length.stepped(n, n_accepted + 1, step)
            self.seconds, self.n_tokens = self.seconds + step, self.n_tokens + n_accepted + 1
        self.length.wrote(self.n_tokens - begin[1])
        plain = PLAIN * (1 + self.noise * np.sqrt(2 / np.pi))
        return plain * (self.n_tokens - begin[1]) / (self.seconds - begin[0])

    def best(self):
        """The same at the best fixed number of tokens."""
        return max(
            sum(self.acceptance**i for i in range(n + 1)) / (n * self.draft + 1 + self.more * n) for n in range(17)
        )


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("more, draft", [(0.0, 0.02), (0.2, 0.1), (0.6, 0.3), (1.0, 0.0), (1.0, 1.0)])
def test_never_much_slower_and_nearly_as_fast_as_the_best(acceptance, more, draft):
    machine = Machine(acceptance, more, draft)
    gain, best = machine.write(2000), machine.best()
    assert gain > 0.98
    assert min(Machine(acceptance, more, draft, seed=seed).write(400) for seed in range(3)) > 0.965  # the first trials
    # a good number is found soon; by how much it is missed in the end: costs that are noise, steps that measure
    assert gain > 0.85 * best


def test_follows_what_changes():
    """A draft that becomes good is found out, and one that becomes bad is left."""
    machine = Machine(0.0, 0.2, 0.1)
    assert machine.write(1000) > 0.96  # nothing is known at first
    machine.acceptance = 0.9
    machine.write(2000)
    assert machine.write(1000) > 0.9 * machine.best()
    machine.acceptance = 0.0
    machine.write(200)
    assert machine.write(1000) > 0.98


def test_long_prompts_and_short_texts():
    """A draft has to read the prompt first: for a few tokens that does not pay."""
    machine = Machine(0.9, 0.2, 0.1)
    n, begin = 40, machine.seconds
    for _ in range(n):
        machine.write(12, n_prompt=2000)
    plain = PLAIN * (1 + machine.noise * np.sqrt(2 / np.pi)) * machine.n_tokens
    assert machine.seconds - begin < plain / 0.98


def test_what_is_tried_grows_from_what_is_known():
    """After two tokens verified at once, six at most, and not sixteen."""
    length = DraftLength(16)
    assert length.choose(1, 1, 100) == (0, False)  # what a plain step takes is not known
    for _ in range(4):
        length.verified(1, PLAIN)
    assert length.choose(1, 1, 0) == (0, False)  # no room
    n, _ = length.choose(1, 1, 100)
    assert n == 2
    length.drafted(2, 0.001)
    length.verified(3, PLAIN)
    length.judged(2, 2)
    length.stepped(2, 3, PLAIN + 0.001)
    n, whole = length.choose(1, 1, 100)
    assert n == 6 and whole
    assert length.choose(1, 1, 4)[0] == 4


def test_costs_between_and_beyond_those_measured():
    length = DraftLength(16)
    for n, seconds in ((1, 1.0), (3, 2.0), (5, 2.5)):
        for wrong in (0.0, 9.0):  # a median
            length.verified(n, seconds)
            length.verified(n, seconds + wrong)
    assert [length.verification_seconds(n) for n in (1, 2, 3, 4, 5, 9)] == [1.0, 1.5, 2.0, 2.25, 2.5, 3.5]
