"""The command line: see the package."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import tests.fuzz as package
from tests.fuzz.corpus import build_corpus
from tests.fuzz.runner import child, run


def main() -> None:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--keep", type=Path, help="folder for inputs that fail")
    parser.add_argument("--corpus", type=Path, help="folder of a corpus made before")
    parser.add_argument("--build", type=Path, help="only make the corpus, here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.seed, options.first, options.first + options.cases, options.keep)
        return
    if options.build:
        options.build.mkdir(parents=True)
        build_corpus(options.build)
        return
    first, cases = (options.only, 1) if options.only is not None else (options.first, options.cases)
    started = time.monotonic()
    counts = run(cases, options.seed, first=first, keep=options.keep, corpus=options.corpus, say=True)
    for outcome, count in sorted(counts.items()):
        print(f"{count:6} {outcome}")
    failures = sum(count for outcome, count in counts.items() if outcome.startswith("FAILED"))
    print(f"{cases} cases of seed {options.seed}, {failures} failures, {time.monotonic() - started:.0f} s")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
