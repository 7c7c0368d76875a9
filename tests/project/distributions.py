"""What is in a wheel and in an sdist: ``python -m tests.project.distributions dist``."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

from hookattn.version import __version__

NEEDED = (
    "hookattn/__init__.py",
    "hookattn/py.typed",
    "hookattn/demo/induction.safetensors",
    "hookattn/render/palette.json",
    "hookattn/render/viewer/hookattn-viewer.js",
    "hookattn_adapters/__init__.py",
)
STRANGE = re.compile(r"(^|/)(tests|node_modules|docs|benchmarks|\.venv|\.git|__pycache__)(/|$)|\.(pyc|tsx?|map)$")


def problems_of_wheel(path: Path) -> list[str]:
    """What is missing of a wheel, or in it and should not be."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (place,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(wheel.read(place).decode("utf-8"))
    found = [f"{name} is missing" for name in NEEDED if name not in names]
    found += [f"{name} should not be in it" for name in names if STRANGE.search(name)]
    found += problems_of_metadata(str(metadata["Version"]), metadata.get_payload())
    return [*found, *([] if metadata["Project-URL"] else ["it has no links"])]


def problems_of_metadata(version: str, readme: object) -> list[str]:
    """What is wrong with a version and a README that are read outside of the repository."""
    found = [] if version == __version__ else [f"its version is {version}, and hookattn/version.py says {__version__}"]
    links = re.findall(r"\]\(([^)]+)\)", str(readme))
    found += [f"the README links to {link}, which is nowhere" for link in links if not re.match(r"https?:|#", link)]
    return found if links else [*found, "the README has no links at all"]


def problems_of_sdist(path: Path) -> list[str]:
    """The same of an sdist."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "Makefile", "tests/conftest.py", *NEEDED[:-1])
    found = [f"{name} is missing" for name in needed if name not in names]
    return found + [f"{name} should not be in it" for name in names if re.search(r"node_modules|\.pyc$|_build/", name)]


def main(folder: str) -> int:
    """Print what is wrong; 1 if anything is."""
    found = [f"{path.name}: {line}" for path in Path(folder).glob("*.whl") for line in problems_of_wheel(path)]
    found += [f"{path.name}: {line}" for path in Path(folder).glob("*.tar.gz") for line in problems_of_sdist(path)]
    print("\n".join(found) or "wheel and sdist hold what they have to")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
