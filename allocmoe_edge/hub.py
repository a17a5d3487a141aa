"""Files of a GGUF model from a repository of the Hugging Face hub."""

from __future__ import annotations

from fnmatch import fnmatch
import os
from pathlib import Path
import re
from typing import List, Optional, Sequence, Union

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def download(
    repo_id: str,
    filename: str,
    additional_files: Optional[Sequence[str]] = None,
    local_dir: Union[str, os.PathLike, None] = None,
    cache_dir: Union[str, os.PathLike, None] = None,
) -> Path:
    """The model's file, the first one if it is split; all of them are there. See `Llama.from_pretrained`."""
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError:
        raise ImportError("from_pretrained needs huggingface_hub: pip install huggingface_hub") from None
    files = HfApi().list_repo_files(repo_id)
    first, *parts = _model(repo_id, files, filename)
    more = [_one(repo_id, files, pattern) for pattern in additional_files or ()]
    paths = [
        hf_hub_download(repo_id, name, local_dir=local_dir, cache_dir=cache_dir) for name in (first, *parts, *more)
    ]
    return Path(paths[0])


def _model(repo_id: str, files: Sequence[str], pattern: str) -> List[str]:
    """The files of the one model that a pattern fits, the first one of a split model first."""
    found = _fitting(repo_id, files, pattern)
    if _PART.search(found[0]):
        stem = _PART.sub("", found[0])
        parts = sorted(name for name in files if _PART.search(name) and _PART.sub("", name) == stem)
        if set(found) <= set(parts):
            return parts
    return [_one(repo_id, files, pattern)]


def _one(repo_id: str, files: Sequence[str], pattern: str) -> str:
    found = _fitting(repo_id, files, pattern)
    if len(found) > 1:
        raise ValueError(f"{repo_id}: several files fit {pattern!r}: {', '.join(found)}")
    return found[0]


def _fitting(repo_id: str, files: Sequence[str], pattern: str) -> List[str]:
    found = sorted(name for name in files if fnmatch(name, pattern))
    if not found:
        raise ValueError(f"{repo_id}: no file fits {pattern!r}; it has: {', '.join(sorted(files))}")
    return found
