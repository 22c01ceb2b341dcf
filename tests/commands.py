"""The scripts as a user calls them, in this process."""

import yaml

from tests.toys import tiny


def write_config(folder, **sections):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny(**sections)))
    return path


def run(script, *arguments):
    return script.main([str(a) for a in arguments])


def refused(capsys, script, *arguments):
    """The one error that the script says, in its last line, with exit code 2."""
    capsys.readouterr()
    assert run(script, *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    return said[-1]
