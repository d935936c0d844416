"""``python -m logitserve``."""

from __future__ import annotations

import sys

from logitserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
