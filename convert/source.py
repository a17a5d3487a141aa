"""The input: whatever the user has (GGUF, split GGUF, Hugging Face folder or repository) as a GGUF file to plan for."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
import signal
import threading
from typing import Iterator

from allocmoe_edge.gguf_file import GGUFFile, model_paths

from . import ConvertError, calibration, estimator_fit, huggingface, output, quantize
from .output_lock import claimed
from .progress import say
from .settings import Settings


@dataclass(frozen=True)
class Source:
    """path: the GGUF file, or the first of a split one. temporary: it was made for this run, and may be used up."""

    path: Path
    temporary: bool


@contextmanager
def as_gguf(settings: Settings) -> Iterator[Source]:
    """The model that `settings` name, as GGUF; what had to be made for that is removed at the end, whatever happens.

    Everything that can be known is checked first: the options, the output, the disk, the model's kind.

    Raises:
        ConvertError: the input cannot be used; says why and what would help.
        GGUFError: a GGUF input is damaged.
    """
    with ExitStack() as stack:
        stack.enter_context(_unwind_on_sigterm())
        _check_texts(settings)
        stack.enter_context(claimed(settings.output))
        if settings.model.is_dir() or not (settings.model.is_file() or settings.model.suffix == ".gguf"):
            yield _from_huggingface(settings, stack)
        else:
            yield _from_gguf(settings, stack)


def _from_gguf(settings: Settings, stack: ExitStack) -> Source:
    for option, value in (("--outtype", settings.outtype), ("--pre-tokenizer", settings.pre_tokenizer)):
        if value is not None:
            raise ConvertError(
                f"{option} is for Hugging Face models; {settings.model} is a GGUF file (--quantize converts it)"
            )
    sources = model_paths(settings.model)
    n_split = 1 if settings.plan_only or settings.quantize else len(sources)
    output.check_target(sources, settings.output, settings.force, _other_inputs(settings), n_split)
    if settings.quantize is None:
        needed = _plan_size(sources[0]) if settings.plan_only else output.copy_size(sources, settings.output)
        output.check_space(settings.output.parent, needed, settings.output.name)
        return Source(settings.model, temporary=False)
    n_elements = 0
    for path in sources:
        with GGUFFile(path) as file:
            n_elements += sum(tensor.n_elements for tensor in file.tensors)
    expected = quantize.n_bytes(n_elements, settings.quantize)
    output.check_space(settings.output.parent, expected + output.METADATA_SLACK, settings.output.name)
    return _quantized(settings, stack, settings.model, expected)


def _plan_size(path: Path) -> int:
    """Bytes that a plan for the model takes, about: without estimates kilobytes."""
    with GGUFFile(path) as file:
        arch = file.get("general.architecture")
        found = [file.get(f"{arch}.{key}") for key in ("block_count", "expert_count", "embedding_length")]
    n_layer, n_expert, n_embd = (n if isinstance(n, int) else 0 for n in found)
    return 10**6 + estimator_fit.stored_size(n_layer, n_expert, n_embd)


def _from_huggingface(settings: Settings, stack: ExitStack) -> Source:
    repository = None
    output.check_target([], settings.output, settings.force, [settings.model, *_other_inputs(settings)])
    if not settings.model.is_dir() and not huggingface.is_repository_id(settings.model.as_posix()):
        raise ConvertError(f"{settings.model}: no such file or folder, and no repository id (org/name)")
    if settings.model.is_dir():  # what is wrong with it first: no package mends that
        n_weights = huggingface.check_folder(settings.model)
    huggingface.check_installed()
    if settings.pre_tokenizer is not None and settings.pre_tokenizer not in huggingface.pre_tokenizers():
        known = ", ".join(huggingface.pre_tokenizers())
        raise ConvertError(
            f"--pre-tokenizer {settings.pre_tokenizer}: llama.cpp has none of that name; there are: {known}"
        )
    folder = settings.model
    if not folder.is_dir():
        repository = settings.model.as_posix()
        say(f"looking for {repository}")
        folder = huggingface.download(repository)
        output.check_target([], settings.output, settings.force, [folder])
        n_weights = huggingface.check_folder(folder)

    outtype = settings.outtype or "auto"
    expected = huggingface.converted_size(n_weights, outtype)
    needed, purpose = expected, f"{settings.output.name} in {outtype}"
    if settings.quantize:
        quantized = quantize.n_bytes(n_weights, settings.quantize)
        needed += quantized
        purpose = f"{settings.output.name} ({output.sizes(0, quantized)[1]} in {settings.quantize}) and, meanwhile, the same in {outtype}"
    output.check_space(settings.output.parent, needed + output.METADATA_SLACK, purpose)

    converted = _temporary(settings, stack, "converted")
    say(f"converting {repository or folder} with llama.cpp's converter, about {expected / 1e9:.2f} GB")
    name = repository and repository.rpartition("/")[2]
    huggingface.convert(folder, converted, outtype, expected, settings.pre_tokenizer, name)
    if settings.quantize is None:
        return Source(converted, temporary=True)
    source = _quantized(settings, stack, converted, quantized)
    converted.unlink()
    return source


def _quantized(settings: Settings, stack: ExitStack, path: Path, expected: int) -> Source:
    assert settings.quantize is not None
    target = _temporary(settings, stack, "quantized")
    say(f"quantising to {settings.quantize}, about {expected / 1e9:.2f} GB")
    quantize.quantize(
        path,
        target,
        settings.quantize,
        n_threads=settings.threads,
        expected=expected,
        imatrix=settings.imatrix,
        allow_requantize=settings.allow_requantize,
    )
    return Source(target, temporary=True)


def _temporary(settings: Settings, stack: ExitStack, what: str) -> Path:
    path = output.hidden(settings.output, what)
    stack.callback(path.unlink, missing_ok=True)
    return path


def _other_inputs(settings: Settings) -> list:
    return [path for path in (settings.calib, settings.imatrix) if path is not None]


def _check_texts(settings: Settings) -> None:
    """What would be found wrong only after the conversion, found now."""
    # what can be read but once, a pipe, is read later
    if settings.calib is not None and (
        settings.calib.is_file() or settings.calib.is_dir() or not settings.calib.exists()
    ):
        calibration.check(settings.calib)
    if settings.imatrix is not None:
        quantize.read_imatrix(settings.imatrix)


@contextmanager
def _unwind_on_sigterm() -> Iterator[None]:
    """Makes the polite ways to end a process run its clean-up, as Ctrl-C does."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # not where it is ignored, as under nohup
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
