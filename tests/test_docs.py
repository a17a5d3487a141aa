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


def test_readme_figures_are_those_of_the_pages():
    """The table of gains and costs repeats figures of docs/speed.md and docs/quality.md."""
    pages = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("speed.md", "quality.md"))
    rows = re.findall(
        r"^\| .* shape.*\||^\| (?:trained|dense).*\|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert len(rows) >= 3
    for row in rows:
        figures = re.findall(r"\d+\.\d\d", "|".join(row.split("|")[2:]))
        assert figures, row
        for figure in figures:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", pages), (
                f"{figure}: on no page, but in README: {row}"
            )
