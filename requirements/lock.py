"""The lock files of this folder: make them, and tell whether they fit a machine.

    build.txt   pip, and what builds packages
    demo.txt    what `make demo` installs; a part of dev.txt
    dev.txt     what the tests need
    mutants.txt what the tests need, and what `make test-mutants` installs beside
    cluster.txt what the tests need, and what `make test-cluster` installs beside
    docs.txt    what the tests need, and what `make docs` and `make dist` install beside
    notebooks.txt what `make test-notebook` installs into an environment of its own: JupyterLab and marimo
    field.txt   the other libraries of the field that `make test-field` installs
    serving.txt what `make test-serving` installs into an environment of its own, for the one platform that it is for

Each has one exact version a package, and markers where Python versions or platforms need different ones. They are
given to pip as constraints (`pip install -c requirements/dev.txt -e ".[dev]"`) and not as a list to install: which
build of torch is installed, with CUDA libraries or without, is the machine's matter, and a constraint pins these
libraries where they are asked for and installs none of them elsewhere. For the same reason there are no hashes: those
of torch's builds differ within one version.

uv makes the files because it resolves for all platforms at once; pip-compile writes what fits the machine it runs on.
pip installs them because it finds a build of torch that the machine has in its own settings, and uv doesn't read these.

The module imports nothing beyond the standard library, and runs on old Pythons too, so that it can say what is wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
ALONE = FOLDER / "alone.in"
FIELD = [ROOT / "tests/field/libraries.txt", ROOT / "tests/field/needed.txt"]
SERVED = ROOT / "tests/serving_vllm/libraries.txt"
SERVING = [SERVED, ROOT / "tests/serving_vllm/needed.txt"]

OLDEST, NEWEST = (3, 11), (3, 13)  # the Pythons that the files are for
# The platforms that the files are for, as uv names them. Their names tell the oldest glibc and macOS that torch has
# wheels for.
PLATFORMS = {
    ("linux", "x86_64"): "x86_64-manylinux_2_28",
    ("linux", "aarch64"): "aarch64-manylinux_2_28",
    ("darwin", "arm64"): "aarch64-apple-darwin",
}
# Pure Python of which there is no wheel: what comes with the mutation tests alone.
UNBUILT = ["--no-binary", "yattag"]
GLIBC = (2, 28)
MACOS = (14, 0)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `3.12.1` is (3, 12, 1), `2.28-rc` is (2, 28)."""
    found = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
        if digits != part:
            break
    return tuple(found)


@dataclass(frozen=True)
class Machine:
    """What decides whether a lock fits."""

    python: tuple[int, ...]
    implementation: str  # cpython, pypy …
    system: str  # linux, darwin, win32 …
    processor: str  # x86_64, aarch64, arm64 …
    glibc: tuple[int, ...]  # () where the C library is another
    macos: tuple[int, ...]  # () elsewhere

    @staticmethod
    def here() -> Machine:
        """The Python that runs this, and what it runs on."""
        libc, version = platform.libc_ver()
        return Machine(
            python=tuple(sys.version_info[:3]),
            implementation=sys.implementation.name,
            system=sys.platform,
            processor=platform.machine(),
            glibc=numbers(version) if libc == "glibc" else (),
            macos=numbers(platform.mac_ver()[0]),
        )

    def __str__(self) -> str:
        system = f"{self.system} {self.processor}"
        if self.system == "linux":
            system += f", glibc {dotted(self.glibc)}" if self.glibc else ", no glibc"
        elif self.macos:
            system += f", macOS {dotted(self.macos)}"
        return f"{self.implementation} {dotted(self.python)} on {system}"


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def pins(lock: Path) -> list[str]:
    """The lines of a lock that pin something."""
    lines = (line.split("#")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def misfit(lock: Path, torch: str, machine: Machine, venv: str = "") -> str | None:
    """Why a lock cannot be installed here, in one line with the cure; None where it can.

    `torch` is the requirement that the caller wants fulfilled, `venv` the environment that exists already and would
    have to go first.
    """
    if not lock.is_file():
        return f"there is no {lock}: LOCK is the folder of the lock files, or `none`"
    again = f"`rm -r {venv}`, then " if venv else ""
    if machine.implementation != "cpython" or not OLDEST <= machine.python[:2] <= NEWEST:
        cure = f"{again}`make PYTHON=python{dotted(OLDEST)} …`"
        if machine.python[:2] > NEWEST:
            cure += ", or the newest of everything without a lock: `make LOCK=none …`"
        return f"{lock} is for CPython {dotted(OLDEST)} to {dotted(NEWEST)}, and this is {machine}: {cure}"
    known = (machine.system, machine.processor) in PLATFORMS
    old = (machine.system == "linux" and machine.glibc < GLIBC) or (
        machine.system == "darwin" and machine.macos < MACOS
    )
    if not known or old:
        return (
            f"{lock} is for Linux (x86_64, aarch64; glibc {dotted(GLIBC)} or newer) and macOS {MACOS[0]} or newer "
            f"(arm64), and this is {machine}: without a lock, `make LOCK=none …` takes what there is"
        )
    locked = next((pin for pin in pins(lock) if pin.startswith("torch==")), torch)
    if torch.replace(" ", "") != locked:
        return f"{lock} holds {locked}, and TORCH is {torch}: `make LOCK=none TORCH={torch} …` goes without the lock"
    return None


def make(torch: str, keep: bool = False) -> None:
    """Makes all lock files anew, and checks that each platform has wheels for them.

    They hold the newest versions; with `keep` those that they hold already, where these fit still.
    """
    with tempfile.TemporaryDirectory() as scratch:
        settings, cap = Path(scratch, "uv.toml"), Path(scratch, "torch.txt")
        cap.write_text(torch + "\n", encoding="utf-8")
        # These are installed without dependencies; uv has to know, or it would lock their dependencies too.
        alone = [pin.partition("==")[0] for pin in (*pins(ALONE), *pins(SERVED))]
        settings.write_text(
            "".join(f'[[dependency-metadata]]\nname = "{name}"\nrequires-dist = []\n' for name in alone),
            encoding="utf-8",
        )

        def compile(*arguments: str | Path) -> None:
            command = ["uv", "--config-file", settings, "pip", "compile", "--quiet", "--no-annotate", *arguments]
            environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": dotted(MACOS)}
            environment["UV_CUSTOM_COMPILE_COMMAND"] = "make lock"
            subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=True)

        def lock(name: str, *arguments: str | Path, platforms: Sequence[str] = ()) -> Path:
            output = FOLDER / f"{name}.txt"
            oldest = dotted(OLDEST)
            upgrade = [] if keep else ["--upgrade"]
            place = platforms or ["--universal"]
            compile(*place, "--python-version", oldest, *upgrade, *arguments, "--output-file", output)
            print(f"{output.relative_to(ROOT)}: {len(pins(output))} pins")
            return output

        project = ROOT / "pyproject.toml"
        demo, dev = ["--extra", "demo"], ["--extra", "demo", "--extra", "dev"]
        build = lock("build", FOLDER / "build.in")
        whole = lock("dev", *dev, project, ALONE, "--constraint", cap)
        lock("demo", *demo, project, ALONE, "--constraint", whole)
        beside = [*dev, "--extra", "mutants"]
        mutants = lock("mutants", *beside, project, ALONE, "--constraint", whole)
        clustered = [*dev, "--extra", "ray"]
        cluster = lock("cluster", *clustered, project, ALONE, "--constraint", whole)
        sited = [*dev, "--extra", "site", "--extra", "release"]
        docs = lock("docs", *sited, project, ALONE, "--constraint", whole)
        noted = ["--extra", "notebooks"]
        notebooks = lock("notebooks", *noted, project, "--constraint", whole)
        field = lock("field", "--no-deps", *FIELD, "--constraint", whole)
        only = ["--python-platform", PLATFORMS["linux", "x86_64"]]  # vLLM for a CPU has no wheels for others
        lock("serving", *SERVING, "--constraint", cap, platforms=only)

        for (system, processor), target in PLATFORMS.items():
            for minor in range(OLDEST[1], NEWEST[1] + 1):
                python = ["--python-platform", target, "--python-version", f"3.{minor}"]
                out = ["--output-file", Path(scratch, "checked.txt")]
                wheels = ["--only-binary", ":all:"]
                compile(*python, *wheels, *dev, project, ALONE, "--constraint", whole, *out)
                compile(*python, *wheels, *UNBUILT, *beside, project, ALONE, "--constraint", mutants, *out)
                compile(*python, *wheels, *clustered, project, ALONE, "--constraint", cluster, *out)
                compile(*python, *wheels, *sited, project, ALONE, "--constraint", docs, *out)
                compile(*python, *wheels, *noted, project, "--constraint", notebooks, *out)
                compile(*python, *wheels, FOLDER / "build.in", "--constraint", build, *out)
                compile(*python, "--no-deps", *FIELD, "--constraint", field, *out)
                print(f"fits Python 3.{minor} on {system} {processor}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_make = commands.add_parser("make", help="make the lock files anew")
    of_make.add_argument("--torch", required=True)
    of_make.add_argument("--keep", action="store_true", help="keep the versions that are locked, where they fit still")
    of_fits = commands.add_parser("fits", help="say in one line why a lock cannot be installed here")
    of_fits.add_argument("lock", type=Path)
    of_fits.add_argument("--torch", required=True)
    of_fits.add_argument("--venv", default="")
    options = parser.parse_args(arguments)
    if options.command == "make":
        make(options.torch, options.keep)
    elif options.command == "fits":
        told = misfit(options.lock, options.torch, Machine.here(), options.venv)
        if told is not None:
            print(told, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
