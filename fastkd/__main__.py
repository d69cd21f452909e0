"""``python -m fastkd``: the command line, for torchrun and where no script is installed."""

import sys

from fastkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
