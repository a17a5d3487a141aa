"""A pytest plugin that runs llama-cpp-python's own tests on `allocmoe_edge.Llama`: see test_upstream_llama.py.

Models are small ones at hand in place of those that the tests download. Their folder is in SMALL_MODELS.
"""

import os
from pathlib import Path
import sys
import types

import allocmoe_edge
import huggingface_hub
import llama_cpp

# the tests import one function of scipy's that they do not call: no reason to need scipy
sys.modules.setdefault("scipy", types.ModuleType("scipy"))
sys.modules.setdefault("scipy.special", types.ModuleType("scipy.special")).log_softmax = None

llama_cpp.Llama = allocmoe_edge.Llama

# what the tests download, by the repository that they name
_MODELS = {
    "lmstudio-community/Qwen3.5-0.8B-GGUF": "instruct.gguf",
    "ggml-org/models": "dense.gguf",
    "CompendiumLabs/bge-small-en-v1.5-gguf": "bert.gguf",
    "QuantFactory/mamba-130m-hf-GGUF": "mamba.gguf",
    "tiiuae/Falcon-H1-Tiny-90M-Instruct-GGUF": "jamba.gguf",
}

huggingface_hub.hf_hub_download = lambda repo, name: str(Path(os.environ["SMALL_MODELS"]) / _MODELS[repo])
