"""``python -m tests.attack``: run the attacks whole, print what was measured, and fail where a bar was not held."""

from __future__ import annotations

import argparse
import sys
import time

from . import present


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.attack", description=__doc__)
    parser.add_argument("--only", default="", help="names of attacks, separated by commas")
    parser.add_argument("--rounds", type=int, help="so many of each, and not its own number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    attacks = {attack.name: attack for attack in present()}
    names = [name for name in options.only.split(",") if name] or list(attacks)
    if unknown := sorted(set(names) - set(attacks)):
        parser.error(f"no such attack: {', '.join(unknown)}; there are {', '.join(attacks)}")
    held = True
    for name in names:
        attack, began = attacks[name], time.monotonic()
        rounds = options.rounds or attack.whole
        print(f"\n{name}: {attack.about} ({rounds})", flush=True)
        for figure in attack.run(rounds, options.seed):
            verdict = "" if figure.bar is None else f"at most {figure.bar:g}: {'held' if figure.held else 'NOT HELD'}"
            print(f"  {figure.what:<64}{figure.measured:>12g}  {verdict}")
            for example in figure.examples:
                print(f"      {example}")
            held = held and figure.held
        print(f"  took {time.monotonic() - began:.0f} s", flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
