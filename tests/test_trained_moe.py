"""The trained MoE model that the repository stores: it is small, and it speaks."""

from pathlib import Path
from pydoc_data.topics import topics

from allocmoe_edge import Llama
from allocmoe_edge.measure.perplexity import perplexity, windows
import pytest

WEIGHTS = Path(__file__).parents[1] / "bench" / "upcycle" / "smolmoe.npz"


@pytest.fixture(scope="module")
def llm(smolmoe_path) -> Llama:
    return Llama(str(smolmoe_path), n_ctx=512, n_batch=512, verbose=False)


def test_what_is_stored_is_small():
    assert WEIGHTS.stat().st_size <= 15e6


def test_half_of_the_routed_neurons_run_at_full_budget(llm):
    assert set(llm.expert_used_count_full) == {8}
    assert llm.metadata["deepseek.expert_count"] == "16"


def test_it_answers_a_question(llm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    found = llm.create_chat_completion(messages, max_tokens=32, temperature=0.0)
    assert "Paris" in found["choices"][0]["message"]["content"]


def test_it_predicts_nearly_as_well_as_the_dense_model(llm, dense_path):
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()[20_000:28_000]
    tokens = windows(llm.tokenize(text, add_bos=False)[:1536], 512)
    assert len(tokens) == 3
    dense = Llama(str(dense_path), n_ctx=512, n_batch=512, verbose=False)
    assert perplexity(llm, tokens) < 1.3 * perplexity(dense, tokens)
