"""`python -m tests.real [pytest arguments]`: the acceptance tests that any provider can serve, on a real server.

Makes the tiny model, starts the server, runs pytest with the upstream's address in the environment, stops the server.
The exit code is pytest's; 2 where the server cannot run. `make test-real` calls it. Must not hold a test itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from tests.real.server import API_KEY, RealServer, ServerError, running
from tests.real.tiny_model import write

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("TOLLGATE_REAL_VENV", ROOT / ".venv-real")) / "bin" / "python"
SELECTION = ["-m", "any_provider", "tests/acceptance"]


def main(arguments: list[str]) -> int:
    """Run everything; `arguments` go to pytest after the selection. Returns the exit code."""
    if not PYTHON.exists():
        print(f"{PYTHON} is missing: run `make test-real`, which builds it.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _leave)  # so that `finally` stops the server
    with tempfile.TemporaryDirectory(prefix="tollgate-real-") as folder:
        try:
            with running(PYTHON, write(Path(folder) / "tiny.gguf"), Path(folder) / "server.log") as server:
                return _pytest(server, arguments)
        except ServerError as error:
            print(f"make test-real: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130


def _pytest(server: RealServer, arguments: list[str]) -> int:
    print(f"real server: {server.url}, model {server.model}", flush=True)
    environment = os.environ | {
        "TOLLGATE_TEST_PROVIDER_URL": server.url,
        "TOLLGATE_TEST_PROVIDER_MODEL": server.model,
        "TOLLGATE_TEST_PROVIDER_KEY": API_KEY,
    }
    code = subprocess.call([sys.executable, "-m", "pytest", *SELECTION, *arguments], env=environment, cwd=ROOT)
    if code != 0:
        log = server.log.read_text(encoding="utf-8", errors="replace")
        print(f"---- the end of the real server's log ----\n{log[-4000:]}", file=sys.stderr)
    return code


def _leave(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
