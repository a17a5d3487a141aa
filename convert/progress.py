"""What a conversion says while it works: lines, and at any moment the stage, its share of the whole and the time that is left, on
a terminal beside a bar, elsewhere in a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from allocmoe_edge.command import printable
from tqdm import tqdm

# Seconds between lines where there is no terminal: at first, and as a share of the time so far.
_LINE_SECONDS, _LINE_SHARE = 30.0, 0.05
# of a stage that has to be done before its own speed counts, and not that of those before
_KNOWN = 0.1


def say(line: str) -> None:
    """A line for the user, on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


class Bar(tqdm):
    """A stage's bar, which counts where it is not shown, too; the conversion that goes on knows of it."""

    def __init__(self, what: str, total: float, unit: str, **options):
        super().__init__(desc=what, total=total, unit=unit, **options)
        self.desc = what  # tqdm drops it where nothing is shown
        self.skipped = 0.0

    def update(self, n: float = 1) -> None:
        if self.disable:
            self.n += n
        else:
            super().update(n)

    def skip(self, n: float = 1) -> None:
        """As update, of what is there from an earlier run: it tells nothing of how long the rest takes."""
        self.skipped += n
        self.update(n)

    def close(self) -> None:
        if _conversion is not None:
            _conversion.close(self)
        super().close()


class Conversion:
    """Which stage a conversion is in, its share of the whole, and the time that is left, by what stages are expected to take in
    proportion to each other and have taken so far."""

    def __init__(self) -> None:
        self.seconds: Dict[str, float] = {}  # by stage
        self._start = time.monotonic()
        self._expected: List[Tuple[str, float]] = []
        self._at = 0  # how many of them are done
        self._bar: Optional[Bar] = None
        self._opened = 0.0
        self._known_seconds = self._known_work = 0.0

    def expect(self, stages: Sequence[Tuple[str, float]]) -> None:
        """stages: name and work of each that is to come, in their order; work in any unit that they have in common."""
        self._expected, self._at = list(stages), 0

    def open(self, bar: Bar) -> None:
        names = [name for name, _ in self._expected]
        if bar.desc in names[self._at :]:
            self._at = names.index(bar.desc, self._at)
        self._bar, self._opened = bar, time.monotonic()
        bar.postfix = str(self)

    def close(self, bar: Bar) -> None:
        if bar is not self._bar:
            return
        spent, work = time.monotonic() - self._opened, self._work(bar)
        name = bar.desc.split(",")[0]
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        if work:
            self._known_seconds += spent
            self._known_work += work * (1 - bar.skipped / max(bar.total, bar.skipped, 1e-9))
            self._at += 1
        self._bar = None

    def _work(self, bar: Bar) -> float:
        """What the stage is expected to take; 0 if it is none of those expected."""
        name, work = self._expected[self._at] if self._at < len(self._expected) else ("", 0.0)
        return work if name == bar.desc else 0.0

    @staticmethod
    def _done(bar: Bar) -> float:
        """Share of the stage that is done."""
        return min(bar.n / bar.total, 1.0) if bar.total else 0.0

    @property
    def share(self) -> Optional[float]:
        """Of the whole that is done; None where it is not known what there is to do."""
        whole = sum(work for _, work in self._expected)
        if not whole:
            return None
        before = sum(work for _, work in self._expected[: self._at])
        bar = self._bar
        return (before + (0.0 if bar is None else self._work(bar) * self._done(bar))) / whole

    @property
    def left(self) -> Optional[float]:
        """Seconds to the end; None where nothing is known of how fast it goes."""
        rest = sum(work for _, work in self._expected[self._at :])
        seconds, work, of_stage = self._known_seconds, self._known_work, 0.0
        bar = self._bar
        if bar is not None and bar.total:
            done, own = self._done(bar), self._work(bar)
            spent, new = time.monotonic() - self._opened, max(bar.n - bar.skipped, 0.0) / bar.total
            if not own:  # on top of what is expected
                of_stage = spent / new * (1 - done) if new else 0.0
            elif new >= _KNOWN:
                of_stage = spent / new * (1 - done)
                seconds, work, rest = seconds + spent, work + own * new, rest - own
            else:
                seconds, work, rest = seconds + (spent if new else 0.0), work + own * new, rest - own * done
        if not work:
            return of_stage or None if not rest else None
        return of_stage + rest * seconds / work

    def __str__(self) -> str:
        share, left = self.share, self.left
        time_left = "time left not known yet" if left is None else f"about {duration(left)} left"
        return time_left if share is None else f"{share:.0%} of the conversion, {time_left}"

    def line(self) -> str:
        """Stage, share and time left."""
        bar = self._bar
        return ("" if bar is None else f"{bar.desc}: ") + str(self)

    def summary(self) -> str:
        """How long everything took."""
        stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.seconds.items() if seconds >= 0.5)
        return f"took {duration(time.monotonic() - self._start)}" + (f": {stages}" if stages else "")

    def show(self) -> None:
        """On a terminal: brings the bar up to date."""
        bar = self._bar
        if bar is not None and not bar.disable:
            bar.postfix = str(self)
            bar.refresh()


_conversion: Optional[Conversion] = None


@contextlib.contextmanager
def conversion(line_seconds: float = _LINE_SECONDS) -> Iterator[Conversion]:
    """A conversion that bars show their share of, for the length of the block; at every moment it is seen to go on."""
    global _conversion
    found, done = Conversion(), threading.Event()
    terminal = sys.stderr.isatty()

    def show() -> None:
        start = last = time.monotonic()
        while not done.wait(min(1.0, line_seconds)):
            now = time.monotonic()
            if terminal:
                found.show()
            elif now - last >= max(line_seconds, _LINE_SHARE * (now - start)):
                say(found.line())
                last = now

    showing = threading.Thread(target=show, daemon=True)
    _conversion = found
    showing.start()
    try:
        yield found
    finally:
        done.set()
        showing.join()
        _conversion = None


def progress_bar(what: str, total: float, unit: str, **options) -> Bar:
    """A bar, on a terminal, that goes when it is done; what takes more than two seconds has one. Options are tqdm's."""
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}" if _conversion is not None else None
    bar = Bar(what, total, unit, disable=None, **{"leave": False, "bar_format": bar_format, **options})
    if _conversion is not None:
        _conversion.open(bar)
        _conversion.show()
    return bar


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """The stage of work that cannot say how far it is."""
    with progress_bar(what, 0, "s", bar_format="{desc}: {elapsed}{postfix}"):
        yield


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
