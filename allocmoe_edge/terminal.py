"""What `allocmoe-chat` reads and prints: messages of several lines, colours where they are wanted, a pipe as well as a person."""

from __future__ import annotations

import os
import sys
from typing import Iterator, List, Sequence
import unicodedata

from .command import CommandError

_BOLD, _DIM = "1", "2"
_BLOCK = '"""'


class Terminal:
    """Standard input and output."""

    def __init__(self) -> None:
        if sys.stdin is None or sys.stdout is None:  # closed by whoever started this
            raise CommandError("standard input and standard output have to be open")
        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):  # bytes that are no text in this locale are no error
                stream.reconfigure(errors="replace")
        self.interactive = sys.stdin.isatty()
        self._to_terminal = sys.stdout.isatty()
        self._colours = self._to_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._at_line_start = True

    def complete(self, commands: Sequence[str]) -> None:
        """Lines can be edited and called back, and Tab completes these words."""
        if not (self.interactive and self._to_terminal):
            return
        try:
            import readline  # from now on input() edits lines and remembers them
        except ImportError:  # a Python without it: lines come as the terminal edits them
            return
        readline.set_completer_delims(" \n")
        readline.set_completer(
            lambda text, i: dict(enumerate(c for c in commands if text and c.startswith(text))).get(i)
        )
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text is one message, whatever its lines

    # in

    def messages(self) -> Iterator[str]:
        """What is typed, or comes through the pipe, to its end. A line is a message. One that ends in a backslash goes on in
        the next line, and what begins with three quotation marks goes on to the next three. Ctrl-C drops what has been typed."""
        asked_to_end = False
        while True:
            try:
                text = self._message()
            except EOFError:
                self.note("")
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.note("" if asked_to_end else "\nCtrl-D or /quit ends the chat.")
                asked_to_end = True
                continue
            asked_to_end = False
            if text.strip():
                yield text

    def _message(self) -> str:
        line = self._line("> ")
        lines: List[str] = []
        if line.lstrip().startswith(_BLOCK):
            line = line.lstrip()[len(_BLOCK) :]
            while not line.rstrip().endswith(_BLOCK):
                lines.append(line)
                try:
                    line = self._line(". ")
                except EOFError:
                    return "\n".join(lines)
            return "\n".join([*lines, line.rstrip()[: -len(_BLOCK)]]).strip("\n")
        while line.endswith("\\"):
            lines.append(line[:-1])
            try:
                line = self._line(". ")
            except EOFError:
                line = ""
        return "\n".join([*lines, line])

    def _line(self, prompt: str) -> str:
        if not self.interactive:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\r\n")
        if not self._to_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
            return input()
        # the marks keep readline from counting the colour as columns
        return input(f"\001\033[{_BOLD}m\002{prompt}\001\033[0m\002" if self._colours else prompt)

    # out

    def write(self, text: str) -> None:
        """A part of what the model says, at once. Control characters in it do not reach a terminal."""
        if self._to_terminal:
            text = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        if not self._at_line_start:
            self.write("\n")

    def print(self, text: str) -> None:
        """What a command answers."""
        self.end_line()
        self.write(text + "\n")

    def note(self, text: str) -> None:
        """Beside the chat, for a person; who reads a pipe does without."""
        if self.interactive:
            self.warn(text)

    def warn(self, text: str) -> None:
        """What has to be known, also by who reads a pipe."""
        self.end_line()
        if self._to_terminal:
            print(f"\033[{_DIM}m{text}\033[0m" if self._colours and text else text, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def bars(self, values: Sequence[float], most: Sequence[float]) -> str:
        """A row of blocks, one a value, each as high as its share; numbers where the output has no such characters."""
        blocks = "▁▂▃▄▅▆▇█"
        try:
            blocks.encode(sys.stdout.encoding or "ascii")
        except UnicodeEncodeError:
            return " ".join(f"{value:.1f}" for value in values)
        shares = [value / top if top else 0.0 for value, top in zip(values, most)]
        return "".join(blocks[min(7, int(8 * share))] if share else " " for share in shares)
