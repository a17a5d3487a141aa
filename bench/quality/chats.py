#!/usr/bin/env python3
"""How near chat answers at a budget are to full budget's: greedy answers of the model at full budget, and what plans make of them.

    python bench/quality/chats.py model.gguf --plans half.gguf third.gguf

For each plan and for uniform k at its budget: along full budget's answers, the share of tokens that would have been the same
and the divergence of the next-token distribution (KL, nats); and of answers that the plan writes itself, token by token, how
many tokens are full budget's before the first that is not.
"""

from __future__ import annotations

import argparse
from pathlib import Path
import sys

from across import plans_of
from allocmoe_edge import GGUFError, Llama, Plan, PlanError
from allocmoe_edge.measure.cores import physical_cores
import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
import numpy as np
from tqdm import tqdm

QUESTIONS = (
    "Why do leaves change colour in autumn?|What should I pack for a week at the sea?|How does a microscope work?|"
    "Write a short poem about an old tree.|What is the capital of Italy, and what is it known for?|How do I make tomato soup?|"
    "Explain to a child why it rains.|Give me three tips for learning a language.|What is a prime number?|"
    "Tell me a story about a fox and a lighthouse.|Why is the sea salty?|How can I remove a coffee stain?|"
    "What does a carpenter do?|Who was Marie Curie?|What is the difference between a frog and a toad?|"
    "Write a polite email that asks for a day off.|How do vaccines protect us?|Name five animals that live in Africa.|"
    "What is inflation?|How do I look after a cactus?|What is a good way to begin a speech?|How far away is the Moon?|"
    "Describe a busy market in a few sentences.|Why do we need sleep?"
).split("|")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="GGUF file in one piece, with a chat template")
    p.add_argument("--plans", type=Path, nargs="+", required=True, help="files of allocmoe-convert")
    p.add_argument("--questions", type=Path, help="UTF-8 text, one a line. Default: 24 everyday ones")
    p.add_argument("--tokens", type=int, default=64, help="of an answer at most. Default: 64")
    p.add_argument("--threads", type=int, default=physical_cores(), help="Default: physical cores")
    return p


class Chats:
    """Answers of a model under plans."""

    def __init__(self, args: argparse.Namespace):
        threads = dict(n_threads=args.threads, n_threads_batch=args.threads)
        self.llm = Llama(str(args.model), n_ctx=1024, n_batch=1024, n_ubatch=512, **threads, verbose=False)
        self.llm.set_plan(None)
        template = self.llm.metadata.get("tokenizer.chat_template")
        if template is None:
            raise ValueError(f"{args.model}: has no chat template")
        texts = [self.llm.detokenize([t], special=True).decode() if t >= 0 else "" for t in self._ends()]
        self.format, self.n_tokens = Jinja2ChatFormatter(template, *texts), args.tokens
        self.vocab = llama_cpp.llama_model_get_vocab(self.llm.model)

    def _ends(self) -> tuple:
        return self.llm.token_eos(), self.llm.token_bos()

    def prompt(self, question: str) -> list:
        text = self.format(messages=[{"role": "user", "content": question}]).prompt
        return self.llm.tokenize(text.encode(), add_bos=False, special=True)

    def answer(self, prompt: list) -> list:
        """Greedy, token by token, under the plan in force; without the token that ends it."""
        self.llm.clear_cache()
        found: list = []
        logits = self.llm.decode(prompt)
        while len(found) < self.n_tokens:
            token = int(logits[-1].argmax())
            if llama_cpp.llama_vocab_is_eog(self.vocab, token):
                break
            found.append(token)
            logits = self.llm.decode([token], len(prompt) + len(found) - 1)
        return found

    def log_p(self, prompt: list, answer: list) -> np.ndarray:
        """float64 [len(answer), n_vocab], of each token of the answer."""
        self.llm.clear_cache()
        rows = self.llm.decode(prompt + answer[:-1], logits_all=True)[len(prompt) - 1 :].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def measure(args: argparse.Namespace) -> dict:
    """By plan: same (share), kl (nats), prefix and length (tokens, means over answers), whole (share of equal answers)."""
    plans = {}
    for path in args.plans:
        uniform, (name, plan) = plans_of([path]).items()
        plans |= {f"uniform k, {plan.budget_total}": uniform[1], f"{name}, {plan.budget_total}": plan}
    full = Plan.full(next(iter(plans.values())).expert_used_count_full)
    questions = args.questions.read_text(encoding="utf-8").splitlines() if args.questions else QUESTIONS
    chats = Chats(args)
    rows: dict = {name: [] for name in plans}
    for question in tqdm(questions, desc="questions", disable=None):
        prompt = chats.prompt(question)
        chats.llm.apply_plan(full)
        answer = chats.answer(prompt)
        if not answer:
            continue
        want = chats.log_p(prompt, answer)
        for name, plan in plans.items():
            chats.llm.apply_plan(plan)
            got = chats.log_p(prompt, answer)
            same = (got.argmax(axis=1) == want.argmax(axis=1)).sum()
            kl = (np.exp(want) * (want - got)).sum()
            own = chats.answer(prompt)
            differs = [a != b for a, b in zip(answer, own)]
            prefix = differs.index(True) if True in differs else min(len(answer), len(own))
            rows[name].append([same, kl, len(answer), prefix, answer == own])
    found = {}
    for name, of in rows.items():
        same, kl, length, prefix, whole = np.array(of, float).T
        found[name] = dict(same=same.sum() / length.sum(), kl=kl.sum() / length.sum(), prefix=prefix.mean())
        found[name] |= dict(length=length.mean(), whole=whole.mean(), answers=len(of))
    return found


def markdown(found: dict) -> str:
    lines = ["| plan, activations | same greedy token | KL | own answer like full budget's for | equal answers |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, v in found.items():
        own = f"{v['prefix']:.1f} of {v['length']:.1f} tokens | {v['whole']:.0%} of {v['answers']}"
        lines.append(f"| {name} | {v['same']:.1%} | {v['kl']:.4f} | {own} |")
    return "\n".join(lines)


def main(argv=None) -> int:
    try:
        print(markdown(measure(parser().parse_args(argv))))
    except (GGUFError, PlanError, ValueError, OSError) as error:
        print(f"bench/quality/chats.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
