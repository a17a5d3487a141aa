#!/usr/bin/env python3
"""Writes the two pages that are made from docstrings: docs/python.md and docs/file-format.md.

    python docs/generate.py

Run it after a change to a docstring of a public name, or to that of allocmoe_edge/plan/metadata.py, and commit both.
"""

from __future__ import annotations

import inspect
from pathlib import Path
import re

import allocmoe_edge
from allocmoe_edge.plan import metadata

DOCS = Path(__file__).resolve().parent

# what users of llama-cpp-python need comes first; a name that is not here follows the others of its class
_ORDER = (
    "Llama",
    "Llama.create_completion",
    "Llama.create_chat_completion",
    "Llama.from_pretrained",
    "Llama.set_budget",
    "Llama.budget_total",
    "Llama.set_speed",
    "Llama.expert_stats",
    "Llama.plan",
    "Llama.set_plan",
    "Llama.expert_used_count_full",
    "Llama.clear_cache",
    "Llama.save_state",
    "Llama.load_state",
    "Llama.cache",
    "Llama.draft_model",
    "Llama.draft_stats",
    "Llama.expert_cache",
    "Llama.miss_price",
    "Llama.prefetch",
    "DraftModel",
    "Plan",
    "GGUFError",
    "PlanError",
    "GenerationError",
)
# under the heading at the end
_LAST = (
    "allocate",
    "parse_budget",
    "Llama.stored",
    "Llama.apply_plan",
    "Llama.decode",
    "Llama.rewind",
    "Llama.second_context",
    "Llama.limited_union",
    "Llama.verifies",
    "Llama.model_params",
)
_FOR_MEASURING = """\
## For plans and measurements of your own

What the converter, the benchmark and draft models are made of. A program that runs models needs none of it.
"""

_PYTHON = """\
# Python API

Made by `docs/generate.py` from the docstrings of `allocmoe_edge`. Terms are explained in [how it
works](how-it-works.md#terms), how to pick a budget in [choosing a budget](budget.md).

Import `allocmoe_edge` before `llama_cpp`: it decides which build of llama.cpp the process loads.

```python
from allocmoe_edge import Llama

llm = Llama(model_path="model-half.gguf", n_ctx=4096, verbose=False)
print(llm.create_completion("The capital of France is", max_tokens=16)["choices"][0]["text"])
```

Below, [`Llama`](#llama) comes first, with the methods that most programs call. What only [plans and measurements of
your own](#for-plans-and-measurements-of-your-own) need stands at the end.

## Differences from llama-cpp-python

`allocmoe_edge.Llama` is a subclass of `llama_cpp.Llama` and takes all of its arguments. What differs:

| | `llama_cpp.Llama` | `allocmoe_edge.Llama` |
| --- | --- | --- |
| import | on its own | `allocmoe_edge` before `llama_cpp` |
| arguments of its own | | `budget`, `token_rule`, `plan_path`, `n_cpu_moe`, `repack`, `prefetch`, `expert_cache`, `miss_price` |
| an argument that it does not know | is ignored | `TypeError`, with the nearest name |
| `flash_attn` | off | on, if no layer is on a GPU and the cache is not of float32 |
| `n_threads`, `n_threads_batch` | half of the processors, all of them | the physical cores that the process may use |
| `n_gpu_layers` | a number | also None or `"auto"`: as many as fit. A number without a GPU says so in a line |
| `model_path` | a str | also a `Path` |
| `n_ctx` above the positions that a model has learned (BERT, GPT-2) | ends the process where a text gets there | is no more than those, with a warning |
| a file larger than the memory | is mapped | gets an expert cache, unless `n_gpu_layers` or `prefetch` is given |
| a file that is missing or damaged | `ValueError` | `GGUFError`, a `ValueError` that names file and reason |
| numbers at full budget | llama.cpp's | the same but for the rounding of sums |
| `budget=` of a completion | | for that text alone |
| a prompt that begins like cached text | goes on from it | the same, if that was computed under the same plan; also entries of `set_cache` |
| another call during a stream (`reset`, a second completion, ...) | the stream goes on with another text | reading on raises a `GenerationError` |
| several threads | no lock | calls wait for each other |
| the child of a fork | not provided for | may use its copy, without a GPU |
| an exception in a logits processor | is printed, and the text goes on | ends the completion and is raised |
| `logit_bias` beside a logits processor | neither has an effect | both have one |
| a grammar, token, state or number that llama.cpp cannot use | may end the process | an error |
| any use after `close()` | may end the process | `RuntimeError` |
| `draft_model` | proposes a fixed number of tokens | the same, or a `DraftModel`, which proposes as many as pay |
| `logprobs` with a draft model | without more | needs `logits_all=True`, as without a draft |
| a draft for a model that cannot forget tokens (a recurrent one) | not checked | `ValueError` |
| `save_state()` | | also holds the plan; logits only with `logits_all=True` |
| `embed()` | | leaves nothing cached; takes several texts without pooling; a reranker gives its scores alone |
| `from_pretrained` | `local_dir_use_symlinks` | has no effect; all files of a split model are downloaded |
| copies (`pickle`, `copy`) | have the arguments | have the budget that was set, too |

`python -m llama_cpp.server` is no part of this: [`allocmoe-server`](server.md) is llama.cpp's own server.
"""

_FILE_FORMAT = """\
# File format

Made by `docs/generate.py` from the docstring of `allocmoe_edge/plan/metadata.py`, the module that reads and writes these
keys. Terms are explained in [how it works](how-it-works.md#terms). To see what a file holds:
[`allocmoe-inspect FILE`](inspect.md).

"""


def python_page() -> str:
    """docs/python.md: every name of allocmoe_edge.__all__, and of each class what it has, in _ORDER."""
    sections: dict = {}
    for name in allocmoe_edge.__all__:
        sections.update(_sections(name, getattr(allocmoe_edge, name)))
    unknown = {*_ORDER, *_LAST} - set(sections)
    if unknown:
        raise SystemExit(f"not public, or without a docstring: {', '.join(sorted(unknown))}")

    def place(name: str) -> tuple:
        whole, _, member = name.partition(".")
        return _rank(whole), bool(member), _rank(name)

    first = sorted(set(sections) - set(_LAST), key=lambda name: (place(name), list(sections).index(name)))
    last = [re.sub("^## ", "### ", sections[name]) for name in _LAST]
    return "\n".join([_PYTHON, *(sections[name] for name in first), _FOR_MEASURING, *last])


def _rank(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def file_format_page() -> str:
    """docs/file-format.md: the docstring itself, which is Markdown."""
    title, _, text = inspect.getdoc(metadata).partition("\n")
    return f"{_FILE_FORMAT}{title}\n{text}\n"


def _sections(name: str, thing) -> dict:
    """What the page says of a name, and of a class's members ("Llama.plan"), by name."""
    if not inspect.isclass(thing):
        return {name: _section("##", f"{name}{_signature(thing)}", thing)}
    if issubclass(thing, Exception):
        return {name: _section("##", f"{name}({thing.__bases__[0].__name__})", thing)}
    found = {name: _section("##", f"{name}{_signature(thing.__init__, thing)}", thing)}
    for member, value in vars(thing).items():
        if member.startswith("_"):
            continue
        key = f"{name}.{member}"
        if isinstance(value, property):
            found[key] = _section("###", key, value)
        elif isinstance(value, classmethod):
            found[key] = _section("###", f"{key}{_signature(value.__func__)}", value.__func__)
        elif inspect.isfunction(value):
            found[key] = _section("###", f"{key}{_signature(value)}", value)
    return {key: section for key, section in found.items() if section}


def _section(level: str, title: str, thing) -> str:
    """A heading and the docstring below; nothing for a member that has none of its own."""
    if not thing.__doc__:
        return ""
    text = inspect.cleandoc(thing.__doc__)
    # "Llama(model_path: str, ...)" is too long for a heading
    name = re.split(r"\(", title, maxsplit=1)[0]
    code = f"```text\n{title}\n```\n\n" if "(" in title else ""
    names = () if isinstance(thing, property) else _parameters(thing)
    return f"{level} {name}\n\n{code}{_markdown(text, names)}\n"


def _own_parameters(function, owner=None) -> list:
    """Parameters but self and cls, and of a class only those that it does not have from another package."""
    parameters = list(inspect.signature(function).parameters.values())[1 if _is_method(function) else 0 :]
    for base in owner.__mro__ if owner else ():
        if base is not object and not base.__module__.startswith("allocmoe_edge"):
            inherited = inspect.signature(base.__init__).parameters
            return [
                p for p in parameters if p.name not in inherited or p.name in ("model_path", "n_gpu_layers", "kwargs")
            ]
    return parameters


def _is_method(function) -> bool:
    return next(iter(inspect.signature(function).parameters), None) in ("self", "cls")


def _parameters(thing) -> list:
    owner = thing if inspect.isclass(thing) else None
    return [p.name for p in _own_parameters(thing.__init__ if owner else thing, owner)]


def _signature(function, owner=None) -> str:
    """As it is called, without types: they are in the text."""
    parts, keyword_only = [], False
    for p in _own_parameters(function, owner):
        if p.kind == p.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        parts.append(f"{stars}{p.name}" + ("" if p.default is p.empty else f"={p.default!r}"))
    return f"({', '.join(parts)})"


def _markdown(text: str, names: list) -> str:
    """A docstring as Markdown: headings such as Args in bold, "name: what it is" of a parameter as an item of a list."""
    lines, open_item = [], None
    for line in text.splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        heading = re.fullmatch(r"(Args|Returns|Raises|Yields):", stripped)
        item = re.match(r"(\*{0,2}\w+(?:, \w+)*): ", stripped)
        known = item and all(n.strip("*") in names or n[:1].isupper() for n in re.split(r", ", item[1]))
        if heading:
            lines += [f"**{heading[1]}**", ""]
            open_item = None
        elif known and (open_item is None or indent <= open_item):
            if lines and lines[-1] and not lines[-1].startswith(("- ", "  ")):
                lines.append("")
            lines.append(f"- `{item[1]}`: {stripped[item.end() :]}")
            open_item = indent
        elif stripped.startswith("- "):
            lines.append(stripped)
            open_item = indent
        elif stripped and open_item is not None and indent > open_item:
            lines.append(f"  {stripped}")
        else:
            if stripped and open_item is not None and lines[-1]:
                lines.append("")
            open_item = open_item if not stripped else None
            lines.append(stripped)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def pages() -> dict:
    """The text of each page by its path."""
    return {DOCS / "python.md": python_page(), DOCS / "file-format.md": file_format_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
