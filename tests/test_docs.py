"""The pages keep to what is there: links, paths, options, environment variables, examples, and what is made from docstrings."""

import ast
import contextlib
import importlib.util
import inspect
import io
from pathlib import Path
import re
import subprocess

import allocmoe_edge
from allocmoe_edge import chat, llama_server
from allocmoe_edge.bench import cli as bench_cli
from allocmoe_edge.convert import cli as convert_cli
from allocmoe_edge.inspect import cli as inspect_cli
import llama_cpp
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "native" / "README.md", *sorted(DOCS.glob("*.md"))]
NOTES = sorted((DOCS / "notes").glob("*.md"))
COMMANDS = {
    "allocmoe-chat": chat,
    "allocmoe-convert": convert_cli,
    "allocmoe-bench": bench_cli,
    "allocmoe-inspect": inspect_cli,
}

# options of other programs that the pages name: pip's, llama.cpp's, ruff's and the like
FOREIGN_OPTIONS = {
    "--override-kv",
    "--no-cache-dir",
    "--no-deps",
    "--n-cpu-moe",
    "--help",
    "--version",
    "--build",
    "--target",
    "--install",
    "--component",
    "--prefix",
    "--api-key-file",
    # pip's and debootstrap's, for another machine
    "--platform",
    "--only-binary",
    "--foreign",
    "--arch",
    "--variant",
    "--include",
    # the evaluation harness's
    "--model",
    "--model_args",
    "--tasks",
    "--limit",
}
# of llama-server: tests/test_llama_server.py looks whether it has them
LLAMA_SERVER_OPTIONS = {
    "--port",
    "--host",
    "--ctx-size",
    "--parallel",
    "--metrics",
    "--api-key",
    "--api-key-file",
    "--fit",
    "--path",
    "--no-repack",
    "--rpc",
    "--mmproj",
    "--model-draft",
    "--spec-type",
    "--spec-draft-n-max",
    "--n-gpu-layers-draft",
    "--device-draft",
    "--threads-draft",
    "--threads-http",
    "--hf-repo-draft",
    "--n-gpu-layers",
    "--no-cache-prompt",
    "--kv-unified",
    "--reranking",
    "--models-dir",
    "--models-preset",
}
# folders of the repository: a path in backticks that starts with one has to exist
TOP = ("allocmoe_commands", "allocmoe_edge", "bench", "convert", "docs", "native", "tests")

# rows of the table in README: where each has its figures from, a heading of docs/speed.md and the model in the table there
README_SPEED = {
    "OLMoE-1B-7B shape, Q4_K_M": ("AMX", "OLMoE-1B-7B, Q4_K_M"),
    "OLMoE-1B-7B shape, AVX-512 without AMX": ("AVX-512 VNNI", "OLMoE-1B-7B, Q4_K_M"),
    "OLMoE-1B-7B shape, AVX2 alone": ("AVX2", "OLMoE-1B-7B, Q4_K_M"),
    "OLMoE-1B-7B shape, AMD EPYC (Zen 4)": ("AVX-512 VNNI, on AMD", "OLMoE-1B-7B, Q4_K_M"),
    "Qwen3-30B-A3B shape, AMD EPYC (Zen 4)": ("AVX-512 VNNI, on AMD", "Qwen3-30B-A3B, all 48 layers, Q4_K_M"),
    "Qwen3-30B-A3B shape, 12 of its 48 layers": ("AMX", "Qwen3-30B-A3B, 12 of 48 layers, Q4_K_M"),
    "DeepSeek-V2-Lite shape, Q4_K_M": ("AMX", "DeepSeek-V2-Lite, Q4_K_M"),
    "gpt-oss-20b shape, 6 of its 24 layers, MXFP4": ("AMX", "gpt-oss-20b, 6 of 24 layers, MXFP4"),
}
# and a heading of docs/quality.md
README_QUALITY = {
    "trained MoE, 17M parameters": "The 17M model",
    "trained MoE, 5M parameters": "The 5M model",
    "SmolMoE: 135M, split from a dense model, then trained": "SmolMoE, 135M parameters",
    "split SmolLM2: 135M, split and not trained, the hard case": "Dense models that were split into experts",
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _prose(path: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def _code(path: Path, language: str) -> list:
    """The fenced code of a language, one string a block, without what indents it."""
    text = path.read_text(encoding="utf-8")
    return [inspect.cleandoc(block) for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.M | re.S)]


def _commands(path: Path) -> list:
    """Every command of a page, in shell blocks and in backticks, as one line without its comment."""
    blocks = [block.replace("\\\n", " ") for block in _code(path, "sh")]
    lines = [line for block in blocks for line in block.split("\n")] + re.findall(r"`([^`\n]+)`", _prose(path))
    return [re.sub(r"\s+#.*", "", line.strip()) for line in lines]


def _anchors(path: Path) -> set:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _help_options(module) -> set:
    """The options in the usage that a command prints, which argparse writes from its parser."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        module.main(["--help"])
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text.getvalue().split("\n\n")[0]))


def _source_options(path: Path) -> set:
    """The options that a program of ours adds, from its source, and those that argparse adds."""
    files = [path] if path.is_file() else [path / "__main__.py"]
    return {"--help"}.union(*(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", file.read_text()) for file in files))


@pytest.fixture(scope="module")
def options() -> dict:
    """The options of each of our commands, by its name."""
    server = set(re.findall(r"--[a-z][\w-]*", llama_server.parser().format_help())) | LLAMA_SERVER_OPTIONS
    return {
        "allocmoe-server": server,
        "allocmoe-rpc-server": {"--host", "--port"},
        **{name: _help_options(module) for name, module in COMMANDS.items()},
    }


@pytest.mark.parametrize("page", [*PAGES, *NOTES], ids=_name)
def test_links_point_to_something(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in _anchors(found), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_paths_exist(page):
    words = set(re.findall(r"`([\w./-]+)`", _prose(page)))
    for command in _commands(page):
        words.update(re.findall(r"(?<![\w/.-])[\w.-]+/[\w./-]+", command))
    for word in words:
        if "/" in word and word.split("/")[0] in TOP:
            assert (ROOT / word).exists(), f"{word}: no such file"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_options_are_the_commands(page, options):
    for command in _commands(page):
        given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", command))
        program = re.search(r"(?:^|\s)(allocmoe-[\w-]+)\s", command)
        script = re.search(r"python ((?:bench|native|tests|docs)/[\w./]+)", command)
        if program:
            assert given <= options[program[1]] | {"--help", "--version"}, f"{command}: not an option"
        elif script:
            assert given <= _source_options(ROOT / script[1]), f"{command}: not an option"
        else:
            known = set().union(*options.values(), FOREIGN_OPTIONS)
            assert given <= known, f"{command}: {given - known} is no option of ours"


@pytest.mark.parametrize("page", [page for page in PAGES if _code(page, "python")], ids=_name)
def test_examples_call_what_is_there(page):
    """Python on the pages parses, and what it passes to Llama, to its methods and to our functions they take."""
    for block in _code(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "llm":
                assert hasattr(allocmoe_edge.Llama, node.attr), f"llm.{node.attr}: no such thing"
            function = _ours(node.func) if isinstance(node, ast.Call) else None
            if function is not None:
                keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
                inspect.signature(function).bind_partial(*node.args, **dict.fromkeys(keywords))


def _ours(node):
    """What is called, bound as it would be, if it is a public name of ours or a method of llm; else None."""
    if isinstance(node, ast.Name) and node.id in allocmoe_edge.__all__:
        return getattr(allocmoe_edge, node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "llm":
        return getattr(allocmoe_edge.Llama, node.attr).__get__(object())
    return None


def test_environment_page_is_complete():
    """Each variable in the first column of a table there is read by a source, and each that ours reads is there."""
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    reads = r"(?:environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*|getenv\(\s*)\"([A-Z_]+)\"|\"([A-Z_]+)\" (?:not )?in os\.environ"
    found, sources = set(), ""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if not re.search(r"\.(py|cpp|h|cuh)$|^Makefile$|CMakeLists\.txt$", name) or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        sources += text
        if not name.startswith("tests/") or "ALLOCMOE_" in text:
            found.update(a or b for a, b in re.findall(reads, text))
    # variables that tools of everybody's read or set, and that are not ours to explain
    found -= {"TERM", "XDG_CACHE_HOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "CXX", "OPENBLAS_NUM_THREADS"}
    found -= {"PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "LLAMA_ARG_MMPROJ"}
    assert found <= named, f"not on the page: {sorted(found - named)}"
    for name in named:
        assert re.search(rf"\b{name}\b", sources), f"{name}: no source reads it"


def test_native_page_lists_every_file():
    """The table of native/README.md has each file of the folder, and no other."""
    listed = set()
    for cell in re.findall(r"^\| (`[^|]+`) \|", (ROOT / "native" / "README.md").read_text(encoding="utf-8"), re.M):
        first, *others = re.findall(r"`([^`]+)`", cell)
        # "`allocmoe-prefetch.h`, `.cpp`": two files of one stem
        listed.update([first, *(Path(first).stem + name if name.startswith(".") else name for name in others)])
    # the options of builds have a table, too
    listed = {name.rstrip("/") for name in listed if not name.startswith("-")}
    there = {path.name for path in (ROOT / "native").iterdir() if path.name not in ("README.md", "__pycache__")}
    assert listed == there


def test_pages_made_from_docstrings_are_current():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, text in generate.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{_name(path)}: run python docs/generate.py, and commit it"


def test_differences_from_llama_cpp_python_are_named():
    """Arguments that only our class has, in the table of docs/python.md."""
    theirs = inspect.signature(llama_cpp.Llama.__init__).parameters
    ours = [name for name in inspect.signature(allocmoe_edge.Llama.__init__).parameters if name not in theirs]
    found = [
        row[2]
        for row in _rows(DOCS / "python.md", "Differences from llama-cpp-python")
        if row[0].startswith("arguments")
    ]
    assert [re.findall(r"`(\w+)`", cell) for cell in found] == [ours]


def _rows(path: Path, heading: str) -> list:
    """The cells of each row of the tables between a heading and the next, without what separates a table's head."""
    _, found, rest = f"\n{path.read_text(encoding='utf-8')}".partition(f"# {heading}\n")
    assert found, f"{_name(path)}: no heading {heading!r}"
    lines = re.findall(r"^\| *(.*?) *\|$", re.split(r"^#", rest, maxsplit=1, flags=re.M)[0], flags=re.M)
    return [re.split(r" *\| *", line) for line in lines if not re.fullmatch(r"[-:| ]+", line)]


def _speed(heading: str, model: str) -> list:
    """Of a model in docs/speed.md: times as fast at full and half budget, of prefill and of decode."""
    rows = _rows(DOCS / "speed.md", heading)
    at = [row[0] for row in rows].index(f"{model}, prefill")
    assert rows[at + 1][0] == "decode"
    return [", ".join(f"{re.search(r'[(]([0-9.]+)[)]', cell)[1]}x" for cell in row[2:4]) for row in rows[at : at + 2]]


def _perplexity(heading: str) -> str:
    """Of a model in docs/quality.md: perplexity at full budget, at half, and at half with uniform k."""
    rows = [row for row in _rows(DOCS / "quality.md", heading) if len(row) > 2]
    found = {(row[0], row[1]): row[2] for row in reversed(rows)}  # of the first table
    return ", ".join(found[row] for row in (("1", "full model"), ("0.5", "ours, token by token"), ("0.5", "uniform k")))


def test_readme_figures_are_those_of_the_pages():
    """Every row of the table of gains and costs repeats a named row of a table in docs/speed.md or docs/quality.md."""
    rows = _rows(ROOT / "README.md", "What it gains, what it costs")[1:]
    assert [row[0] for row in rows] == [*README_SPEED, *README_QUALITY]
    for name, prefill, decode, perplexity in rows:
        if name in README_SPEED:
            assert [prefill, decode, perplexity] == [*_speed(*README_SPEED[name]), ""], name
        else:
            assert [prefill, decode, perplexity] == ["", "", _perplexity(README_QUALITY[name])], name
