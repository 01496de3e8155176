"""`python -m loadtests.simulated_provider`: the same options as `tollgate simulate`. Must not hold any logic."""

from __future__ import annotations

import sys

from loadtests.simulated_provider.server import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
