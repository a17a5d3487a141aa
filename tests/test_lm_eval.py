"""The harness's model, on tasks in local files."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

from allocmoe_edge import PlanError
from conftest import plan_from_made_up_profile
import numpy as np
import odd_models
import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="pip install lm_eval")

TASKS = {
    "local_choice": {
        "output_type": "multiple_choice", "doc_to_text": "Q: {{q}}\nA:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "local_answer": {
        "output_type": "generate_until", "doc_to_text": "Q: {{q}}\nA:", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    return plan_from_made_up_profile(odd_models.write_talker(folder / "source.gguf"), folder / "talker.gguf")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"q": "What is red?", "choices": [" blood", " grass", " snow"], "answer": 0, "text": "Blood is red. " * 200},
        {"q": "What is green?", "choices": [" blood", " grass", " snow"], "answer": 1, "text": "Grass is green."},
    ]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, task in TASKS.items():
        whole = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
            "test_split": "test", **task,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return folder


def evaluated(model, tasks, tmp_path, arguments) -> dict:
    command = [sys.executable, "-m", "allocmoe_edge.lm_eval", "--model", "allocmoe", "--include_path", str(tasks)]
    command += [
        "--model_args",
        f"model={model},n_ctx=256{arguments}",
        "--tasks",
        ",".join(TASKS),
        "--output_path",
        str(tmp_path),
    ]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = tmp_path.rglob("results*.json")
    return json.loads(found.read_text())["results"]


def test_tasks(model, tasks, tmp_path):
    """The harness's own command, at two budgets: figures for each task, and other ones at another budget."""
    perplexities = []
    for budget in ("", ",budget=full"):
        (tmp_path / f"out{budget}").mkdir()
        found = evaluated(model, tasks, tmp_path / f"out{budget}", budget)
        assert 0 <= found["local_choice"]["acc,none"] <= 1 and found["local_answer"]["exact_match,none"] == 0
        perplexities.append(found["local_text"]["word_perplexity,none"])
    assert perplexities[0] != perplexities[1] and min(perplexities) > 1


def test_scores(model):
    """Log probabilities are those of the logits, also of texts in several batches and beyond the context."""
    from allocmoe_edge.lm_eval import AllocmoeLM

    lm = AllocmoeLM(str(model), n_ctx=256, n_batch=32)
    context, continuation = list(range(40, 140)), list(range(60, 100))
    (found,) = lm._loglikelihood_tokens([(None, context, continuation)])
    tokens = context + continuation
    rows = []
    for begin in range(0, len(tokens), 32):
        rows.append(lm.llm.decode(tokens[begin : begin + 32], begin, logits_all=True).copy())
    rows = np.concatenate(rows).astype(np.float64)[len(context) - 1 : -1]
    wanted = sum(row[token] - np.logaddexp.reduce(row) for row, token in zip(rows, continuation))
    assert found[0] == pytest.approx(wanted, rel=1e-5) and found[1] == (rows.argmax(1) == continuation).all()
    (cut,) = lm._loglikelihood_tokens([(None, list(range(30, 200)) * 3, continuation)])
    (same,) = lm._loglikelihood_tokens([(None, (list(range(30, 200)) * 3)[-(257 - 40) :], continuation)])
    assert cut == same


def test_continuations_that_cannot_be_scored(model):
    """Of no tokens, and of more than the context: they ended in errors of numpy's. One that fills the context can be."""
    from allocmoe_edge.lm_eval import AllocmoeLM

    lm = AllocmoeLM(str(model), n_ctx=256)
    good = (None, [40, 41], list(range(60, 100)))
    with pytest.raises(ValueError, match="^a continuation of no tokens, after 'Q: ': there is nothing to score"):
        lm._loglikelihood_tokens([good, (("Q: ", ""), [40, 41], [])])
    with pytest.raises(ValueError, match="^n_ctx: found 256, want at least 257, the tokens of a continuation"):
        lm._loglikelihood_tokens([good, (None, [40, 41], [60] * 257)])
    assert lm.llm.n_tokens == 0
    assert len(lm._loglikelihood_tokens([(None, [40, 41], [60] * 256)])) == 1


def test_answers_that_leave_no_room_for_the_prompt(model):
    """An error before anything is generated, as of the harness's own models; at a context's length the prompt was not cut off,
    and beyond that its beginning was missing, both without a word."""
    from allocmoe_edge.lm_eval import AllocmoeLM

    lm = AllocmoeLM(str(model), n_ctx=256)
    requests = [SimpleNamespace(args=("Q: What is red?\nA:", {"max_gen_toks": n})) for n in (4, 256, 300)]
    for request, n in ((requests[1], 256), (requests[2], 300)):
        with pytest.raises(ValueError, match=f"^n_ctx: found 256, want more than the {n} tokens"):
            lm.generate_until([requests[0], request])
        assert lm.llm.n_tokens == 0
    prompt = "Q: What is red? " * 100
    tokens = lm.tok_encode(prompt)
    seen = []

    def completion(prompt, max_tokens, **options):
        seen.append((prompt, max_tokens))
        return {"choices": [{"text": ""}]}

    lm.llm.create_completion = completion
    lm.generate_until([SimpleNamespace(args=(prompt, {"max_gen_toks": n})) for n in (4, 255)])
    assert seen == [(tokens[-252:], 4), (tokens[-1:], 255)]
    seen.clear()  # the harness's other names for it
    both = {"max_tokens": 6, "max_new_tokens": 5}
    options = ({"max_new_tokens": 7}, both, {"max_completion_tokens": 8, "max_gen_toks": None})
    lm.generate_until([SimpleNamespace(args=("a", each)) for each in options])
    assert [n for _, n in seen] == [7, 5, 8]


def test_wrong_arguments(model):
    from allocmoe_edge.lm_eval import AllocmoeLM

    with pytest.raises(PlanError, match="budget: found 9.5"):
        AllocmoeLM(str(model), budget=9.5)
    with pytest.raises(TypeError, match="did you mean budget"):
        AllocmoeLM(str(model), budgt=0.5)
