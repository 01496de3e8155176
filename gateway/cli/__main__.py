"""`python -m gateway.cli`, the same as `tollgate`. Must not hold any logic."""

from __future__ import annotations

import sys

from gateway.cli import main

if __name__ == "__main__":
    sys.exit(main())
