"""`python -m gpt2c`: the command line where its script is not on the path."""

import sys

from gpt2c.cli import main

if __name__ == "__main__":
    sys.exit(main())
