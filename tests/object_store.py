"""A real S3 server for the tests, by tools/object_store.sh."""

import os
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "tools" / "object_store.sh"


class ObjectStore:
    """A SeaweedFS on the loopback with the bucket `vid`; its clients find it by this process's environment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.start()

    def start(self) -> None:
        """Start it, or start it again on what it held."""
        self._run("start")
        lines = (self._folder / "env").read_text().replace("export ", "").split()
        self.environment = dict(line.split("=", 1) for line in lines)
        os.environ.update(self.environment)

    def kill(self) -> None:
        """End it at once."""
        self._run("kill")

    def freeze(self) -> None:
        """It keeps its connections and answers nothing."""
        self._run("freeze")

    def thaw(self) -> None:
        """It goes on where it was."""
        self._run("thaw")

    def close(self) -> None:
        """End it for good."""
        pid = self._folder / "pid"
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)

    def _run(self, verb: str) -> None:
        environment = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run(
            ["bash", str(SCRIPT), verb, str(self._folder)], capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
