"""deltaworks as a user runs it, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Shell:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = os.environ | {"DELTAWORKS_CATALOG": str(root / "catalog"), "COLUMNS": "200"}

    def run(
        self, *arguments: object, code: int = 0, extra: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "deltaworks.cli.main", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=self.root,
            env=self.environment | (extra or {}),
            check=False,
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def error(self, *arguments: object, code: int = 2) -> str:
        done = self.run(*arguments, code=code)
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        return done.stderr
