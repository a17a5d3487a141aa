"""Loads our build of llama.cpp, makes llama_cpp use it, and binds what llama_cpp does not: allocmoe_* and gguf_*.

Importing this module is what decides which libllama the process runs, so it must come before `llama_cpp`.
"""

import contextlib
import ctypes
import os
from pathlib import Path
import re
import sys
from typing import Any, Iterator, Optional

import cffi


def _find_build() -> Path:
    """The folder that holds lib/, include/ and upstream/: this package's, or its installed copy's when this one is
    the source tree (an editable install, or Python started in a checkout)."""
    here = Path(__file__).resolve().parent
    for folder in (here, *(Path(entry) / here.name for entry in sys.path)):
        if (folder / "lib").is_dir():
            return folder
    raise ImportError(f"allocmoe_edge: its native libraries are not in {here}: install the package (pip install .)")


BUILD_DIR = _find_build()

_GGUF_CDEF = """
struct gguf_init_params { bool no_alloc; void ** ctx; };
typedef struct gguf_context gguf_context;
gguf_context * gguf_init_from_file(const char * fname, struct gguf_init_params params);
gguf_context * gguf_init_empty(void);
void         gguf_free(gguf_context * ctx);
size_t       gguf_get_data_offset(const gguf_context * ctx);
int64_t      gguf_get_n_kv(const gguf_context * ctx);
int64_t      gguf_find_key(const gguf_context * ctx, const char * key);
const char * gguf_get_key(const gguf_context * ctx, int64_t key_id);
int          gguf_get_kv_type(const gguf_context * ctx, int64_t key_id);
int          gguf_get_arr_type(const gguf_context * ctx, int64_t key_id);
const char * gguf_get_val_str(const gguf_context * ctx, int64_t key_id);
const void * gguf_get_val_data(const gguf_context * ctx, int64_t key_id);
size_t       gguf_get_arr_n(const gguf_context * ctx, int64_t key_id);
const void * gguf_get_arr_data(const gguf_context * ctx, int64_t key_id);
const char * gguf_get_arr_str(const gguf_context * ctx, int64_t key_id, size_t i);
int64_t      gguf_get_n_tensors(const gguf_context * ctx);
size_t       gguf_get_tensor_offset(const gguf_context * ctx, int64_t tensor_id);
const char * gguf_get_tensor_name(const gguf_context * ctx, int64_t tensor_id);
size_t       gguf_get_tensor_size(const gguf_context * ctx, int64_t tensor_id);
int          gguf_get_tensor_type(const gguf_context * ctx, int64_t tensor_id);
int64_t      gguf_remove_key(gguf_context * ctx, const char * key);
void         gguf_set_val_u32(gguf_context * ctx, const char * key, uint32_t val);
void         gguf_set_val_str(gguf_context * ctx, const char * key, const char * val);
void         gguf_set_arr_data(gguf_context * ctx, const char * key, int type, const void * data, size_t n);
bool         gguf_write_to_file(const gguf_context * ctx, const char * fname, bool only_meta);

const char * ggml_type_name(int type);
size_t       ggml_type_size(int type);
int64_t      ggml_blck_size(int type);
bool         ggml_is_quantized(int type);
size_t       ggml_quantize_chunk(int type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row, const float * imatrix);

struct llama_model_tensor_buft_override { const char * pattern; void * buft; };
void * ggml_backend_cpu_buffer_type(void);

size_t ggml_backend_reg_count(void);
void   ggml_backend_load_all_from_path(const char * dir_path);
"""


def _library_path(directory: Path, name: str) -> Path:
    for file in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll", f"lib{name}.dll"):
        if (directory / file).exists():
            return directory / file
    raise ImportError(f"allocmoe_edge: no library '{name}' in {directory}")


def cdef_of(header: Path) -> str:
    """The declarations of one of our C headers, for cffi."""
    body = header.read_text().split("// [cffi begin]")[1].split("// [cffi end]")[0]
    return re.sub(r"//[^\n]*|LLAMA_API ", "", body)


def _allocmoe_cdef() -> str:
    headers = (BUILD_DIR / "include" / name for name in ("allocmoe.h", "allocmoe-calibration.h"))
    return "struct llama_context;\n" + "".join(map(cdef_of, headers))


def _wait_politely() -> None:
    """Threads that wait for each other give up their core after some 0.1 ms, unless the user has said how to wait.

    GCC's OpenMP would spin some 100 times as long, for the core that another program runs on. It reads this once, when it is
    loaded, so a program that has loaded it before keeps what it had.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"


_OTHER_FOLDER = "unset LLAMA_CPP_LIB_PATH or point it at allocmoe-edge's libraries"


def _import_llama_cpp(lib_dir: Path):
    loaded_before = "llama_cpp.llama_cpp" in sys.modules
    named = os.environ.get("LLAMA_CPP_LIB_PATH")
    folder = named or str(lib_dir)
    os.environ["LLAMA_CPP_LIB_PATH"] = folder
    os.environ["MTMD_CPP_LIB"] = os.environ.get("MTMD_CPP_LIB") or folder
    try:
        import llama_cpp
    except OSError as error:
        why = "" if isinstance(error, FileNotFoundError) else f" that can be read ({error.strerror})"
        raise ImportError(
            f"allocmoe_edge: no libraries in {folder}{why}: "
            + (_OTHER_FOLDER if named else "the package is incomplete: install it again (pip install .)")
        ) from None
    except RuntimeError as error:  # of a library that does not load, llama_cpp's own words
        why = str(error.__context__ or error).strip()
        raise ImportError(
            f"allocmoe_edge: its libraries cannot be loaded: {why} (what a build for GPUs needs comes with the card's driver)"
        ) from None

    raw = llama_cpp.llama_cpp
    if not hasattr(raw._lib, "allocmoe_plan_version"):
        raise ImportError(
            f"allocmoe_edge: llama_cpp has loaded the libraries in {raw._base_path}, which are not allocmoe-edge's: "
            + ("import allocmoe_edge before llama_cpp" if loaded_before else _OTHER_FOLDER)
        )
    return llama_cpp, Path(raw._base_path)


_wait_politely()
llama_cpp, LIB_DIR = _import_llama_cpp(BUILD_DIR / "lib")

ffi = cffi.FFI()
ffi.cdef(_allocmoe_cdef() + _GGUF_CDEF)
libllama = ffi.dlopen(str(_library_path(LIB_DIR, "llama")))
libggml = ffi.dlopen(str(_library_path(LIB_DIR, "ggml")))
libggml_base = ffi.dlopen(str(_library_path(LIB_DIR, "ggml-base")))

# a portable build (GGML_BACKEND_DL) picks its backends at run time, and looks for them beside the executable
if libggml.ggml_backend_reg_count() == 0:
    libggml.ggml_backend_load_all_from_path(str(LIB_DIR).encode())


# what llama_cpp logs to, and what we log to when not verbose
_log_all = llama_cpp._logger.llama_log_callback
# native, since what a signal raises within a callback of Python is lost
_log_errors, _log_nothing = (
    llama_cpp.llama_log_callback(int(ffi.cast("uintptr_t", ffi.addressof(libllama, name))))
    for name in ("allocmoe_log_errors", "allocmoe_log_nothing")
)


def set_verbose(verbose: bool) -> None:
    """Logs everything from now on, as llama_cpp does, or errors alone; a logger that somebody else has set stays.

    llama_cpp's logger is Python code, which llama.cpp's calls run even where it prints nothing. Ctrl-C in it is lost:
    no exception can leave a callback. So there is none where nothing but errors is to be printed.
    """
    current, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(current), ctypes.byref(data))
    if any(_address(current) == _address(known) for known in (_log_all, _log_errors)):
        llama_cpp.llama_log_set(_log_all if verbose else _log_errors, None)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without a log of llama.cpp's, for what may fail and is tried otherwise then."""
    current, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(current), ctypes.byref(data))
    llama_cpp.llama_log_set(_log_nothing, None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(current, data)


def _address(function) -> Optional[int]:
    return ctypes.cast(function, ctypes.c_void_p).value


def context_pointer(llm) -> Any:
    """`struct llama_context *` of a `llama_cpp.Llama`, for the allocmoe_* functions."""
    return ffi.cast("struct llama_context *", llm.ctx)
