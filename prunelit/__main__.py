"""python -m prunelit: see `prunelit.cli.main`."""

import sys

from prunelit.cli.main import main as main
from prunelit.cli.main import render_usage as render_usage

if __name__ == "__main__":
    sys.exit(main())
