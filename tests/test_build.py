"""What was built: which libraries are loaded, and that every struct has the layout that ctypes declares."""

from collections import defaultdict
import ctypes
import json
import os
from pathlib import Path
import platform
import re
import shutil
import subprocess
import sys

import allocmoe_edge
from allocmoe_edge._native import BUILD_DIR, LIB_DIR
import llama_cpp
import pytest

INCLUDE = BUILD_DIR / "include"


def python(code: str, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, cwd="/"
    )


def clean_env() -> dict:
    return {k: v for k, v in os.environ.items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}


def test_llama_cpp_runs_our_library():
    assert hasattr(llama_cpp.llama_cpp._lib, "allocmoe_plan_version")
    assert llama_cpp.llama_cpp._base_path == LIB_DIR


def test_only_our_libraries_are_mapped():
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc/self/maps, which only Linux has")
    with open("/proc/self/maps") as maps:
        mapped = {line.split()[-1] for line in maps if "libllama" in line or "libggml" in line}
    assert mapped and all(os.path.dirname(path) == str(LIB_DIR) for path in mapped)


def test_llama_cpp_imported_first_with_other_libraries(tmp_path):
    """Our libraries without our functions stand in for stock ones: the same files, the one symbol renamed."""
    for library in LIB_DIR.iterdir():
        data = library.read_bytes().replace(b"allocmoe_plan_version", b"otherwise_named_symbl")
        (tmp_path / library.name).write_bytes(data)
    code = "import llama_cpp, allocmoe_edge"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**clean_env(), "LLAMA_CPP_LIB_PATH": str(tmp_path)},
    )
    assert done.returncode != 0
    assert "import allocmoe_edge before llama_cpp" in done.stderr
    assert str(tmp_path) in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="links a library")
def test_a_library_that_the_machine_lacks(tmp_path):
    """As a build for GPUs where there is no driver: one line that names it."""
    link = ["cc", "-shared", "-x", "c", "/dev/null", "-L", tmp_path, "-Wl,--no-as-needed", "-o"]
    subprocess.run([*link, tmp_path / "libdriver.so.1"], check=True)
    subprocess.run([*link, tmp_path / "libllama.so", "-l:libdriver.so.1"], check=True)
    (tmp_path / "libdriver.so.1").unlink()
    code = "import sys, allocmoe_commands; sys.exit(allocmoe_commands.inspect())"
    env = {**clean_env(), "LLAMA_CPP_LIB_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: allocmoe_edge: its libraries cannot be loaded: libdriver.so.1: cannot open")


@pytest.mark.parametrize("folder", ["", "nothing here", 5000 * "a"])
def test_a_variable_that_names_no_libraries(tmp_path, folder):
    """An empty one is as none."""
    (tmp_path / "nothing here").mkdir()
    env = {**clean_env(), "LLAMA_CPP_LIB_PATH": folder and str(tmp_path / folder)}
    code = "import sys, allocmoe_commands; sys.argv[1:] = ['--version']; sys.exit(allocmoe_commands.inspect())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if folder:
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert str(tmp_path / folder) in done.stderr and "unset LLAMA_CPP_LIB_PATH" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_a_package_without_libraries(tmp_path):
    """As of a build that was broken off; no variable has to do with it."""
    package = tmp_path / "allocmoe_edge"
    shutil.copytree(BUILD_DIR, package, ignore=shutil.ignore_patterns("lib", "upstream", "__pycache__"))
    (package / "lib").mkdir()
    code = "import sys, allocmoe_commands; sys.exit(allocmoe_commands.inspect())"
    env = {**clean_env(), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: allocmoe_edge: no libraries in {package / 'lib'}: the package is incomplete")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="configures a build")
def test_our_kernels_go_into_every_variant_of_the_cpu_backend(tmp_path):
    """Of a wheel for any CPU of the platform (docs/install.md). What was built is looked at by tests/cpu_variants.py."""
    options = ["-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON"]
    command = ["cmake", "-S", Path(__file__).resolve().parent.parent / "native", "-B", tmp_path, *options]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sources = defaultdict(set)
    for each in json.loads((tmp_path / "compile_commands.json").read_text()):
        target = re.search(r"/(ggml-cpu-[^/]*)\.dir/", each["command"])
        if target:
            sources[target[1]].add(Path(each["file"]).name)
    assert len(sources) > 4
    for target, files in sources.items():
        ours = {file for file in files if file.startswith("allocmoe-")}
        if target.endswith("-feats"):  # says whether a variant can run here, compiled without its instructions
            assert not ours, target
        else:
            assert {
                f"allocmoe-{part}.cpp" for part in ("attention", "cache-product", "mul-mat", "router", "transpose")
            } < ours, target


def test_our_libraries_are_found_without_any_variable():
    done = subprocess.run(
        [sys.executable, "-c", "import allocmoe_edge; print(allocmoe_edge._native.LIB_DIR)"],
        capture_output=True,
        text=True,
        env=clean_env(),
    )
    assert done.stdout.strip() == str(LIB_DIR), done.stderr


def test_multimodal_library_loads():
    from llama_cpp import mtmd_cpp

    assert mtmd_cpp.mtmd_default_marker() == b"<__media__>"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF headers")
def test_libraries_find_each_other_by_relative_rpath():
    for library in LIB_DIR.glob("*.so"):
        dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        rpath = [
            line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "RUNPATH" in line or "RPATH" in line
        ]
        assert rpath in ([], ["$ORIGIN"]), f"{library.name}: {rpath}"
        assert not library.is_symlink()


def test_upstream_converter_is_installed():
    upstream = BUILD_DIR / "upstream"
    done = subprocess.run(
        [sys.executable, "-c", "import gguf; print(gguf.__file__)"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(upstream / "gguf-py")},
    )
    assert done.stdout.strip().startswith(str(upstream)), done.stderr
    assert (upstream / "convert_hf_to_gguf.py").is_file()
    assert (upstream / "conversion" / "__init__.py").is_file()


# an anonymous union in C, a named member in ctypes: one of its members stands for it
ANONYMOUS = {"llama_model_kv_override.value": "val_i64"}
# llama-cpp-python 0.3.36 has not followed a field that llama.h added at the end of it (optimizer_type). It is the
# argument of llama_opt_init, training, which nothing here calls.
KNOWN_MISMATCHES = {"llama_opt_params": (40, 48)}


def structs():
    from llama_cpp import mtmd_cpp

    for module in (llama_cpp.llama_cpp, mtmd_cpp):
        for name, value in vars(module).items():
            # not every one has fields: opaque handles cross as pointers only
            if isinstance(value, type) and issubclass(value, ctypes.Structure) and getattr(value, "_fields_", None):
                yield name, value


def test_structs_have_the_layout_that_ctypes_declares(tmp_path):
    """sizeof and offsetof of every struct that llama_cpp mirrors, as the C compiler sees them in our headers."""
    declared, lines = {}, []
    for name, struct in structs():
        declared[name] = ctypes.sizeof(struct)
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        for field in struct._fields_:
            member = f"{name}.{field[0]}"
            declared[member] = getattr(struct, field[0]).offset
            in_c = ANONYMOUS.get(member, field[0])
            lines.append(f'printf("{member} %zu\\n", offsetof(struct {name}, {in_c}));')
    assert len(declared) > 100
    source = tmp_path / "layout.c"
    headers = ("stddef.h", "stdio.h", "llama.h", "mtmd.h", "mtmd-helper.h")
    source.write_text("".join(f"#include <{h}>\n" for h in headers) + "int main(void) {" + "".join(lines) + "}")
    subprocess.run(["cc", "-I", INCLUDE, source, "-o", tmp_path / "layout"], check=True)
    compiled = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    in_c = {name: int(value) for name, value in (line.split() for line in compiled.splitlines())}
    assert {name: (declared[name], in_c[name]) for name in declared if declared[name] != in_c[name]} == KNOWN_MISMATCHES


def test_what_runs_at_load_needs_no_vector_instructions():
    """A build for any CPU loads all variants of the backend before it asks which of them can run. With tables filled by AVX
    there it would end on CPUs without."""
    if not shutil.which("objdump") or platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("needs objdump, and an x86-64")
    code = ""
    for library in LIB_DIR.glob("*ggml-cpu*"):
        code += subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
        ).stdout
    at_load = re.findall(r"^\w+ <_GLOBAL__sub_I_\w*allocmoe[^>]*>:\n(?:.+\n)+", code, re.MULTILINE)
    if not at_load:
        pytest.skip("this build's functions have no names")
    assert not [line for function in at_load for line in function.splitlines() if re.search("%[xyz]mm", line)]


def test_version_is_the_packages():
    from importlib.metadata import version

    assert allocmoe_edge.__version__ == version("allocmoe-edge")


@pytest.mark.parametrize(
    "given, spins",
    [({}, "2000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    ids=["by default", "as the user says", "by the user's policy"],
)
def test_threads_wait_politely(given, spins):
    """libgomp itself says how long its threads spin before they give up their core."""
    env = {k: v for k, v in clean_env().items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import allocmoe_edge"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**env, **given, "OMP_DISPLAY_ENV": "verbose"},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    shown = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not shown:
        pytest.skip("this build's threads are not libgomp's")
    assert shown[-1] == spins
