"""Writes requirements.lock, the versions that are installed: python -m tools.lock."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from utils.command import InputError, path_name, run_script, say
from utils.files import write_text

DESCRIPTION = """\
Write the exact versions of all packages that are installed for a requirements file: those that it
names and those that they need, in alphabetical order. Others that happen to be installed are left
out."""
HEADER = """\
# The exact versions that the tests last passed with (Python {python}, Linux), written by make lock.
# To install them: python -m pip install --requirement requirements.lock
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and writes the file. Returns the exit code: 0, 2 (bad input)."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--requirements", type=path_name, default=Path("requirements-dev.txt"), metavar="FILE")
    add("--output", type=path_name, default=Path("requirements.lock"), metavar="FILE")
    return run_script(parser, argv, lock)


def lock(arguments: argparse.Namespace) -> None:
    """Writes the lock file."""
    versions = installed_versions(read_requirements(arguments.requirements))
    python = ".".join(map(str, sys.version_info[:2]))
    lines = (f"{name}=={version}\n" for name, version in sorted(versions.items()))
    write_text(arguments.output, HEADER.format(python=python) + "".join(lines))
    say(f"{arguments.output}: {len(versions)} packages")


def read_requirements(path: Path) -> Iterator[str]:
    """Yields the requirements in a file and in those that it includes with -r."""
    for line in path.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            yield from read_requirements(path.parent / text.removeprefix("-r ").strip())
        elif text:
            yield text


def installed_versions(requirements: Iterable[str]) -> dict[str, str]:
    """Returns the installed version of each package that the requirements need, by its name.

    Without local labels such as +cpu, which no index has. Raises InputError for one that is missing
    or has a version that is not allowed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()  # (package, extra)
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        wanted, extra = todo.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        try:
            found = distribution(wanted.name)
        except PackageNotFoundError:
            raise InputError(f"{wanted}: not installed; make install first") from None
        if not wanted.specifier.contains(found.version, prereleases=True):
            raise InputError(f"{wanted}: {found.version} is installed; make install first")
        versions[name] = found.version.partition("+")[0]
        for own_extra in ("", *wanted.extras):
            if (name, own_extra) not in seen:
                seen.add((name, own_extra))
                needs = map(Requirement, found.requires or ())
                todo += [(need, own_extra) for need in needs]
    return versions


if __name__ == "__main__":
    sys.exit(main())
