"""How every command of ours ends: nothing that a user gives it ends in a traceback."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import traceback
from typing import Callable, Iterator, Optional, Sequence, Union

from .argument_error import ArgumentError
from .gguf_file import GGUFError
from .plan import PlanError, metadata


class CommandError(Exception):
    """What a command was asked for cannot be done; the message says why, and what would make it possible."""


@contextlib.contextmanager
def load_errors(path: Union[str, os.PathLike]) -> Iterator[None]:
    """What llama.cpp says while a model is loaded becomes a CommandError that names the file; what we refuse names the option."""
    try:
        yield
    except (GGUFError, PlanError):
        raise
    except ArgumentError as error:
        raise CommandError(error.of_command()) from error
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"{path}: llama.cpp cannot load it: {error}") from error
    except Exception as error:
        if not is_of_chat_template(error):
            raise
        raise CommandError(f"{path}: its chat template: {error}") from error


def is_of_chat_template(error: BaseException) -> bool:
    """Whether it is what a model's chat template has raised, or how that is written."""
    from jinja2 import TemplateError

    return isinstance(error, TemplateError)


def need_model(path: Union[str, os.PathLike], otherwise: str) -> metadata.ModelPlan:
    """What a model's file carries, without the estimator. Raises PlanError, which ends in `otherwise`, where it is a plan alone."""
    stored = metadata.read(path, estimator=False)
    if stored.side_file:
        raise PlanError(f"{path}: has a plan and no model: {otherwise}")
    return stored


# what is wrong with the input or with the machine, and no fault of ours
_EXPECTED = (CommandError, GGUFError, PlanError, OSError, MemoryError)


def run_command(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], None],
    argv: Optional[Sequence[str]] = None,
    *,
    interrupted: Optional[Callable[[argparse.Namespace], str]] = None,
    known_only: bool = False,
) -> int:
    """Parses a command's arguments and does its work.

    Whatever goes wrong becomes one line on stderr, "PROGRAM: error: REASON"; the option --debug, which is added to the
    parser, prints the trace of it too. Arguments that the parser refuses end in argparse's own words. The output is
    flushed, so that a full disk behind stdout is an error as well.

    Args:
        work: takes the parsed arguments. Raises CommandError, GGUFError, PlanError or OSError for what the user can mend.
        interrupted: takes the parsed arguments after Ctrl-C and says what is left behind, in words.
        known_only: arguments that the parser does not know are no error but a list, `rest`.

    Returns:
        The exit code: 0; 1 for an error; 2 for arguments that are refused; 130 after Ctrl-C; 141 where the reader
        of the output stopped reading, as of a program that the system ends for it.
    """
    program = parser.prog
    parser.add_argument("--debug", action="store_true", help="print where an error comes from")
    args = argparse.Namespace(debug=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name in another script than the terminal's is no error
    try:
        try:
            if known_only:
                args, args.rest = parser.parse_known_args(argv, args)
            else:
                args = parser.parse_args(argv, args)
            work(args)
            code = 0
        except SystemExit as end:  # argparse's, after --help or an error that it has printed
            code = _exit_code(program, end)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        message = interrupted(args) if interrupted is not None else ""
        _complain("\n" + ": ".join(filter(None, (program, "interrupted", printable(message)))))
        return 130
    except BrokenPipeError:  # the reader of our output, head or less, has seen enough
        _discard(sys.stdout)
        return 128 + 13  # SIGPIPE, which Python ignores
    except Exception as error:
        if args.debug:
            _complain(traceback.format_exc().rstrip())
        _complain(f"{program}: error: {reason(error)}")
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except OSError:  # Python would try it once more at exit, and complain
                _discard(stream)


def printable(text: str) -> str:
    """A line for the terminal: names in a file are not ours, and no control sequence of theirs reaches it."""
    return "".join(character if character.isprintable() else "?" for character in text)


def reason(error: BaseException) -> str:
    """An exception in one line, as a user can read it."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    else:
        text = str(error)
    text = printable(" ".join(text.split()))
    if isinstance(error, MemoryError):
        return "out of memory" + (f": {text}" if text else "")
    if isinstance(error, _EXPECTED):
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ") + " (this should not happen; --debug shows where it does)"


def _exit_code(program: str, end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    _complain(f"{program}: error: {end.code}")
    return 1


def _complain(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nowhere left to say it
        pass


def _discard(stream) -> None:
    """What is still in a stream's buffer, and all that is written to it from now on, goes nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # no file behind it, as in a test
        pass
