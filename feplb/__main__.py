"""python -m feplb: the same as the command feplb."""

import sys

from feplb.cli import main

if __name__ == "__main__":
    sys.exit(main())
