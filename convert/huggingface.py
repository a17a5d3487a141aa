"""Hugging Face models as input: looked at before hours are spent on them, downloaded, and converted by upstream."""

from __future__ import annotations

from fnmatch import fnmatch
from importlib.util import find_spec
import json
import math
import operator
from pathlib import Path
import re
import sys
from typing import Iterator, Optional

from allocmoe_edge._native import BUILD_DIR

from . import ConvertError, output, subprocesses

UPSTREAM = BUILD_DIR / "upstream"
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "auto": 2, "q8_0": 34 / 32}

_NEEDED = ("torch", "transformers", "huggingface_hub", "yaml", "sentencepiece")
# what a conversion reads. No *.py: upstream runs a tokenizer's own code, and none is fetched unasked
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md"]
# of a model that has no others: upstream unpickles nothing but weights from them
_WEIGHTS, _OLD_WEIGHTS = "model*.safetensors", "pytorch_model*.bin"
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")


def is_repository_id(text: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not text.endswith(".gguf")


def pre_tokenizers() -> list:
    """Names that upstream's converter gives to the pre-tokenizers it knows; llama.cpp implements each."""
    source = (UPSTREAM / "conversion" / "base.py").read_text(encoding="utf-8")
    return sorted(set(re.findall(r'^ +res = "([^"]+)"$', source, re.MULTILINE)))


def check_installed() -> None:
    """Raises ConvertError, with the command that helps, if a package that upstream's converter needs is not there."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConvertError(
            f'converting Hugging Face models needs {", ".join(missing)}: pip install "allocmoe-edge[hf]"'
        )


def download(repository: str) -> Path:
    """The folder of a repository (org/name) in huggingface_hub's cache, downloaded as far as it is not there.

    Raises:
        ConvertError: no such repository, or a gated one; no network; a dense model; too little disk.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    patterns = _PATTERNS
    try:
        check_config(Path(huggingface_hub.hf_hub_download(repository, "config.json")), repository)
        try:
            files = huggingface_hub.snapshot_download(
                repository, allow_patterns=[*_PATTERNS, _OLD_WEIGHTS], dry_run=True
            )
            if any(fnmatch(file.filename, _WEIGHTS) for file in files):
                files = [file for file in files if not fnmatch(file.filename, _OLD_WEIGHTS)]
            else:
                patterns = [*_PATTERNS, _OLD_WEIGHTS]
            size = sum(file.file_size for file in files if file.will_download)
            output.check_space(Path(constants.HF_HUB_CACHE), size, f"the download of {repository}")
        except errors.DryRunError:
            pass  # no network: what is in the cache will do, or the next line says what is missing
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise ConvertError(
            f"{repository}: a gated repository: ask for access on {constants.ENDPOINT}/{repository}, then log in "
            "(hf auth login) or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConvertError(
            f"{repository}: no such folder here, and no such repository on {constants.ENDPOINT} (or a private one: log "
            "in with hf auth login, or set HF_TOKEN)"
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise ConvertError(
            f"{repository}: has no config.json, so no model to convert; of a repository with GGUF files, download one "
            "and give its name"
        ) from None
    except errors.HFValidationError:
        raise ConvertError(
            f"{repository}: no such file or folder here, and no name of a repository (org/name)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ConvertError(
            f"{repository}: no such folder here, and {constants.ENDPOINT} cannot be reached to look for a repository of "
            "that name (no network, or HF_HUB_OFFLINE is set)"
        ) from None
    except (errors.HTTPError, OSError) as error:
        raise ConvertError(f"{repository}: download failed: {error}") from None


def check_config(path: Path, name: str) -> None:
    """Raises ConvertError if a config.json cannot be read or describes a model without experts."""
    config = _read_json(path, name)
    if not any(_expert_counts(config)):
        raise ConvertError(f"{name}: a dense model: it has no experts to allocate (config.json names none)")


def _read_json(path: Path, name: str) -> dict:
    """The object in a JSON file of the model `name`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"{name}: its {path.name} cannot be read: {error}") from None


def _expert_counts(config: dict) -> Iterator[bool]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif re.search("expert|moe", key) and not re.search("per_tok|top_k|shared", key):
            yield any(isinstance(n, int) and n > 1 for n in (value if isinstance(value, list) else [value]))


def check_folder(folder: Path) -> int:
    """Refuses a folder that upstream's converter would refuse later.

    Returns:
        about how many weights the model has.

    Raises:
        ConvertError: no model, a dense one, or one without weights or tokenizer.
    """
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; it holds GGUF files, give one of them ({ggufs[0].name})" if ggufs else ""
        raise ConvertError(f"{folder}: no Hugging Face model: it has no config.json{hint}")
    check_config(folder / "config.json", str(folder))
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        raise ConvertError(f"{folder}: the tokenizer is missing: no {', '.join(_TOKENIZERS)}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = _read_json(index, str(folder)).get("weight_map")
        if not (isinstance(files, dict) and files and all(isinstance(name, str) for name in files.values())):
            raise ConvertError(f"{folder}: its {index.name} names no files of weights (weight_map)")
        names = set(files.values())
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ConvertError(f"{folder}: {len(missing)} of {len(names)} weight files are missing: {missing[0]}, ...")
        return sum(_safetensors_size(folder / name) for name in names)
    weights = sorted(folder.glob(_WEIGHTS))
    if weights:
        return sum(map(_safetensors_size, weights))
    weights = sorted(folder.glob(_OLD_WEIGHTS))
    if not weights:
        raise ConvertError(f"{folder}: the weights are missing: no {_WEIGHTS}, no {_OLD_WEIGHTS}")
    return sum(path.stat().st_size for path in weights) // 2


def _safetensors_size(path: Path) -> int:
    """Weights in a file, in units that upstream writes: numbers, or half the bytes of packed 4-bit blocks."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size) if size < 1 << 28 else b"")
        total = 0
        for name, tensor in header.items():
            if name != "__metadata__":
                n = math.prod(map(operator.index, tensor["shape"]))
                total += n // 2 if tensor["dtype"] == "U8" else n * 8 if tensor["dtype"] == "I32" else n
        if not 0 <= total < 1 << 60:
            raise ValueError("no size that a file can have")
        return total
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise ConvertError(f"{path}: damaged or truncated safetensors file: its header cannot be read") from None


def converted_size(n_weights: int, outtype: str) -> int:
    """Estimated size in bytes of the GGUF file that upstream writes."""
    return int(n_weights * _BYTES[outtype])


def convert(
    folder: Path, target: Path, outtype: str, expected: int, pre_tokenizer: Optional[str], name: Optional[str]
) -> None:
    """Converts `folder` to the GGUF file `target` with upstream's converter.

    Args:
        outtype: one of OUTTYPES.
        expected: estimated size of the target in bytes, for the progress bar.
        pre_tokenizer: one of `pre_tokenizers()`, or None to let upstream recognise it.
        name: the model's name, or None to let upstream derive it from the folder.

    Raises:
        ConvertError: upstream refuses the model, or memory or disk run out.
    """
    command = [sys.executable, Path(__file__).with_name("upstream.py"), UPSTREAM, pre_tokenizer or ""]
    command += [folder.resolve(), "--outfile", target.resolve(), "--outtype", outtype]
    command += ["--model-name", name] if name else []
    # nothing that a model's files name is to be fetched from the network behind the user's back
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        subprocesses.run(command, target, expected, "converting", env)
    except subprocesses.ChildFailed as error:
        reason = error.reason
        if "pre-tokenizer was not recognized" in error.log:
            reason = (
                "llama.cpp's converter does not know its pre-tokenizer (how text is split before BPE merges); if you "
                f"know which one it is like, name it with --pre-tokenizer: {', '.join(pre_tokenizers())}"
            )
        raise ConvertError(f"converting {folder}: {reason}") from None
