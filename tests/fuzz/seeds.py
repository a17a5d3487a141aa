"""Writes what fuzzing begins with: a tiny model, and side files for it under every token rule. `python tests/fuzz/seeds.py FOLDER`."""

from dataclasses import replace
from pathlib import Path
import struct
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from allocmoe_edge.plan import metadata
import fuzz_gguf


def main(folder: Path) -> None:
    (folder / "seeds").mkdir(parents=True, exist_ok=True)
    path = fuzz_gguf.write_bases(folder)[0]
    model = metadata.read(path)
    for number, rule in enumerate(("off", "batch", "threshold", "estimate")):
        for estimator in (model.profile.estimator, None):
            if rule == "estimate" and estimator is None:
                continue
            profile = replace(model.profile, token_rule=rule, estimator=estimator)
            side = folder / "side.gguf"
            metadata.write_side_file(side, model, profile.plan(0.5, model.full), profile)
            wish = struct.pack("<qbb10s", 8 + number, number, -1, (b"balanced", b"fast", b"full", b"")[number])
            (folder / "seeds" / f"{rule}-{estimator is not None}").write_bytes(side.read_bytes() + wish)
            side.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
