#!/usr/bin/env python3
"""A software bill of materials: prints what an installed allocmoe-edge is made of, as CycloneDX 1.5 JSON (make sbom).

Python packages are those of the environment that runs this, in the versions that it has; llama.cpp is the pinned archive with
its hash, and what llama.cpp carries of others is of the versions that its headers name. Licences are SPDX expressions.
"""

from importlib import metadata
import json
from pathlib import Path
import re
import sys

import prepare

# of llama.cpp's folder vendor: name, header, what is before each number of its version, licence
VENDORED = (
    ("miniaudio", "miniaudio/miniaudio.h", ("MA_VERSION_MAJOR", "MA_VERSION_MINOR", "MA_VERSION_REVISION"), "Unlicense OR MIT-0"),
    ("stb_image", "stb/stb_image.h", ("stb_image - v",), "Unlicense OR MIT"),
    ("subprocess.h", "sheredom/subprocess.h", (), "Unlicense"),
    ("xxHash", "hash/xxhash/xxhash.h", ("XXH_VERSION_MAJOR", "XXH_VERSION_MINOR", "XXH_VERSION_RELEASE"), "BSD-2-Clause"),
    ("sha256", "hash/sha256/sha256.h", (), "MIT"),
    ("sha1", "hash/sha1/sha1.h", (), "LicenseRef-public-domain"),
    ("rotate-bits", "hash/rotate-bits/rotate-bits.h", (), "MIT"),
    ("cpp-httplib", "cpp-httplib/httplib.h", ("CPPHTTPLIB_VERSION ",), "MIT"),
    ("nlohmann-json", "nlohmann/json.hpp", ("NLOHMANN_JSON_VERSION_MAJOR", "NLOHMANN_JSON_VERSION_MINOR", "NLOHMANN_JSON_VERSION_PATCH"), "MIT"),
)  # fmt: skip


def python_packages(name: str) -> list:
    """Components for what the package of this name needs, directly or not, of what is installed."""
    found, wanted = {}, [name]
    while wanted:
        for requirement in metadata.requires(wanted.pop()) or ():
            if "extra ==" in requirement:
                continue
            needed = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
            try:
                package = metadata.distribution(needed)
            except metadata.PackageNotFoundError:  # for another system or Python
                continue
            if needed not in found:
                found[needed] = component(needed, package.version, purl=f"pkg:pypi/{needed}@{package.version}")
                wanted.append(needed)
    return [found[needed] for needed in sorted(found)]


def vendored(folder: Path) -> list:
    components = []
    for name, header, marks, licence in VENDORED:
        text = (folder / header).read_text(errors="replace")
        numbers = [re.search(re.escape(mark) + r'\s*"?([\d.]+)', text)[1] for mark in marks]
        components.append(component(name, ".".join(numbers), licence))
    return components


def component(name: str, version: str, licence: str = "", **more) -> dict:
    found = {"type": "library", "name": name, **more}
    if version:
        found["version"] = version
    if licence:
        found["licenses"] = [{"expression": licence}]
    return found


def bill(llama_cpp: Path) -> dict:
    pin = prepare.PIN
    archive = component("llama.cpp", f"as in the source archive of {pin['name']} {pin['version']}", "MIT")
    archive["hashes"] = [{"alg": "SHA-256", "content": pin["sha256"]}]
    archive["components"] = vendored(llama_cpp / "vendor")
    archive["pedigree"] = {"notes": "changed by native/patches of this project"}
    own = component("allocmoe-edge", metadata.version("allocmoe-edge"), "MIT")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {**own, "type": "application"}},
        "components": [archive, *python_packages("allocmoe-edge")],
    }


if __name__ == "__main__":
    cache = prepare.cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    json.dump(bill(prepare.unpack(prepare.obtain_archive(cache), prepare.trees_dir())), sys.stdout, indent=2)
    print()
