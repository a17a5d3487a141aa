"""Alloc-L's isolated sensitivity profile (Liu et al., ACL 2026, arXiv 2604.08133), measured by the runtime itself."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from allocmoe_edge import Llama
from allocmoe_edge.perplexity import negative_log_likelihood


def n_passes(full: tuple) -> int:
    """Runs over the calibration text that `isolated` needs: sum over layers of (K_l - 1), plus one."""
    return sum(k - 1 for k in full if k) + 1


def isolated(llm: Llama, full: tuple, token_windows: np.ndarray) -> tuple:
    """S[l,k]: perplexity with layer l at k experts, every layer before it at its own K, every layer after it at 1.

    Layer l at K and layer l+1 at 1 are the same model, so that each layer but the first reuses one run.

    Args:
        full: K_l per layer, 0 where a layer routes no experts.
        token_windows: int32, shape [n_windows, n_ctx].

    Returns:
        One float64 array of shape [K_l] per layer, empty where K_l is 0. The plan of `llm` is left as it was set last.
    """
    layers = [il for il, k in enumerate(full) if k]
    rows = [np.empty(k) for k in full]
    with tqdm(total=n_passes(full), desc="sensitivity", unit="pass", disable=None, smoothing=0.05) as bar:
        before = None
        for position, il in enumerate(layers):
            for k in range(1, full[il] + 1):
                if k == 1 and before is not None:
                    rows[il][0] = before
                    continue
                counts = list(full)
                for later in layers[position + 1 :]:
                    counts[later] = 1
                counts[il] = k
                llm.set_plan(counts)
                rows[il][k - 1] = np.exp(negative_log_likelihood(llm, token_windows).mean())
                bar.update()
            before = rows[il][-1]
    return tuple(rows)
