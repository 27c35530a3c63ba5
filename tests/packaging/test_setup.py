"""scripts/setup on a Python that cannot make environments; every other test covers the successful case."""

import os
import shutil
import subprocess

from repository import ROOT

# Behaves like Debian's python3 without python3-venv: starts an environment but never installs pip into it.
NO_ENSUREPIP = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "asked: $*"
mkdir -p .venv/bin
printf '#!/bin/sh\\nexit 1\\n' > .venv/bin/python
chmod +x .venv/bin/python
exit 1
"""


def test_an_unfinished_environment_is_made_again(tmp_path):
    place = tmp_path / "a clone"
    (place / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup", place / "scripts" / "setup")
    python = tmp_path / "python3"
    python.write_text(NO_ENSUREPIP)
    python.chmod(0o755)
    for _ in range(2):
        made = subprocess.run(
            [place / "scripts" / "setup"],
            env=os.environ | {"PYTHON": str(python)},
            capture_output=True,
            text=True,
            cwd="/",
        )
        assert made.returncode == 1
        assert "asked: -m venv .venv" in made.stderr
        assert made.stderr.splitlines()[-1].startswith(f"setup: {python} cannot make environments")
        assert "python3-venv" in made.stderr
