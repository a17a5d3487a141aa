"""The trained MoE model that the repository stores: it is small, and it speaks."""

from pathlib import Path
from pydoc_data.topics import topics
import sys

from allocmoe_edge import Llama, Plan
from allocmoe_edge.measure.perplexity import perplexity, windows
from allocmoe_edge.plan import metadata
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench" / "quality"))

import chats

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


def test_answers_are_compared_with_full_budgets(smolmoe_path, tmp_path):
    model, full = metadata.read(smolmoe_path), (8,) * 30
    for name, k in (("all", 8), ("one", 1)):
        profile = metadata.Profile(
            [[0.1 * (8 - k) for k in range(1, 9)]] * 30, (1.0,) * 30, metadata.Calibration("words", 1, "")
        )
        metadata.write_side_file(tmp_path / f"{name}.plan.gguf", model, Plan((k,) * 30, full), profile)
    (tmp_path / "questions.txt").write_text("What is the capital of France?\n")
    files = [str(tmp_path / f"{name}.plan.gguf") for name in ("all", "one")]
    args = [str(smolmoe_path), "--plans", *files, "--questions", str(tmp_path / "questions.txt"), "--tokens", "12"]
    found = chats.measure(chats.parser().parse_args(args))
    every, one = found["all, 240"], found["one, 30"]
    assert (every["same"], every["whole"], every["prefix"]) == (1, 1, every["length"]) and abs(every["kl"]) < 1e-6
    assert one["kl"] > 0.05 and one["same"] < 1 and one["prefix"] < one["length"]
    assert found["uniform k, 30"] == one
