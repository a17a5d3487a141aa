"""Run Mixture-of-Experts language models under an expert activation budget.

Importing this package makes llama_cpp load our build of llama.cpp, so import it first.

>>> from allocmoe_edge import Llama
>>> llm = Llama(model_path="model.gguf")
>>> llm.create_chat_completion(messages=[{"role": "user", "content": "Hello"}])
"""

from . import _native  # noqa: F401  first: it decides which libllama the process runs
from .checked_llama import GenerationError
from .draft import DraftModel
from .gguf_file import GGUFError
from .llama import Llama
from .plan import Plan, PlanError, allocate, parse_budget

__version__ = "0.1.0"
__all__ = ["DraftModel", "GGUFError", "GenerationError", "Llama", "Plan", "PlanError", "allocate", "parse_budget"]
