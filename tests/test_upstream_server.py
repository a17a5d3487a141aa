"""llama.cpp's own tests of its server, from its source archive, on allocmoe-server (see upstream_server.py)."""

import collections
import importlib.util
import re

from allocmoe_edge import llama_server
from allocmoe_edge.command import CommandError
import pytest
import upstream_server

try:
    llama_server.binary()
except CommandError as missing:
    pytest.skip(str(missing), allow_module_level=True)

# what fails on llama.cpp's own binary too, as the stand-ins are other models, and with no network; see the note on the server
KNOWN = {
    r"test_basic::test_no_ui|test_access_static_assets_without_api_key": "llama.cpp's own page is not in the source archive",
    r"test_chat_completion::test_chat_completion(\[|_cached_tokens)|test_completion::test_completion(_stream)?\[|test_slot_(save_restore$|erase|"
    r"restore_legacy)|test_tokenize_with_bos|test_return_progress|test_completion_prompt_cache|test_nocache_long_input_prompt|test_ctx_shift_": (
        "counts tokens, by another model's vocabulary"
    ),
    r"test_chat_completion::test_chat_template$|test_completion_response_fields": "that model begins a text with <s>",
    r"test_infill::": "the vocabulary has no tokens for infill",
    r"test_embedding_multiple_with_fa|test_embedding_mixed_input": "longer texts, and other tokens, than the embedding model here has",
    r"test_kv_keep_only_active|test_n_probs_post_(backend_)?sampling": "reads random text as UTF-8, or compares it: by chance",
    r"test_mcp_proxy|test_router_download_model": "needs a network",
}


@pytest.mark.slow
def test_upstreams_tests_pass(tmp_path):
    lacking = [name for name in upstream_server.NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        pytest.skip(f"upstream's tests need {', '.join(lacking)}")
    upstream_server.write_models(tmp_path)
    found = upstream_server.run(llama_server.binary(), upstream_server.upstream_tests(), tmp_path, [], 3600)
    known = re.compile("|".join(KNOWN))
    failed = {name: why for name, (outcome, why) in found.items() if outcome == "failed" and not known.search(name)}
    assert not failed
    counts = collections.Counter(outcome for outcome, _ in found.values())
    assert counts["passed"] > 250, counts
