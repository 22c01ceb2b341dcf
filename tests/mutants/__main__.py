"""Breaks the formulas on purpose, one at a time, and sees a test fail: make mutants.

Each .patch beside this file is a mistake that other implementations made. It is applied to a copy
of the tree; the tests of the method, of the training loop and of every ladder have to notice.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ["tests/diffusion", "tests/pipeline/test_codec.py", "tests/training/test_loop.py"]
TESTS += ["tests/pipeline/test_table.py", "tests/tools/test_import_diffusers.py"]
TESTS += ["tests/test_methods.py"]
QUICK = "not two_processes and not killed"  # those see no other mistake in a formula
LINKED = ("data", "pretrained")  # folders that the tests only read


def main() -> int:
    """Runs every mutant, or those named on the command line; 0 if a test noticed each."""
    patches = sorted(Path(__file__).parent.glob("*.patch"))
    patches = [p for p in patches if not sys.argv[1:] or p.stem in sys.argv[1:]]
    if noticed(None):
        print("the tests fail without a mutant too", file=sys.stderr)
        return 1
    survivors = [patch.stem for patch in patches if not noticed(patch)]
    print(f"{len(patches) - len(survivors)} of {len(patches)} mutants noticed")
    if survivors or not patches:
        print(f"survived: {', '.join(survivors) or 'there are none to try'}", file=sys.stderr)
        return 1
    return 0


def noticed(patch: Path | None) -> bool:
    """Whether a test fails once the patch is applied; None for no patch."""
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.toml", "*.npz", "*.msgpack", "evaluation"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        for name in LINKED:
            Path(folder, name).symlink_to(ROOT / name)
        # GIT_CEILING_DIRECTORIES: the copy is no part of any repository
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(Path(folder).parent)}
        if patch is not None:
            apply = ["git", "apply", patch.resolve()]
            subprocess.run(apply, cwd=folder, check=True, env=environment)
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", QUICK, *TESTS],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    print(
        f"{patch.stem if patch else 'no mutant'}: {failed[0] if failed else 'no test failed'}",
        flush=True,
    )
    if result.returncode not in (0, 1):
        print(result.stdout[-2000:] + result.stderr[-2000:], file=sys.stderr)
    return result.returncode == 1 and bool(failed)


if __name__ == "__main__":
    sys.exit(main())
