"""docs/architectures.md is true: every class goes as far as its table says, from a tiny random folder to generation."""

from pathlib import Path
import re

import pytest

torch = pytest.importorskip("torch", reason="makes the models, and upstream's converter needs it")
transformers = pytest.importorskip("transformers", minversion="5", reason="the model classes")

from allocmoe_edge._native import BUILD_DIR  # noqa: E402
import architectures  # noqa: E402  (imports follow the skips)

PAGE = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| `\w+` \| ([\w.]+) \|", PAGE, re.MULTILINE))
# the table is of one version of transformers; under another, classes may be missing or may have been mended
SAME_VERSION = f"transformers {transformers.__version__}" in PAGE


@pytest.fixture(scope="module")
def found() -> dict:
    registered = architectures.registered(BUILD_DIR / "upstream")
    return {kind: names for kind, names in architectures.find().items() if names[1] in registered}


@pytest.fixture(scope="module")
def results(found, tmp_path_factory) -> dict:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return architectures.sweep(BUILD_DIR / "upstream", tmp_path_factory.mktemp("architectures"), found)
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize("model_type", ROWS)
def test_architecture(model_type, results):
    if model_type not in results and not SAME_VERSION:
        pytest.skip(f"not in transformers {transformers.__version__}")
    result, detail = results[model_type]
    # "transformers": there is nothing to compare with. 5.24 cannot run Llama4ForConditionalGeneration without an image
    if not SAME_VERSION and (ROWS[model_type] != "runs" or result == "transformers"):
        pytest.skip(f"{result} under transformers {transformers.__version__}: {detail}")
    assert result == ROWS[model_type], detail


def test_table_is_complete(found):
    if not SAME_VERSION:
        pytest.skip(f"the table is not of transformers {transformers.__version__}")
    assert set(found) == set(ROWS)
