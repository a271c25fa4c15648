"""`gpt2c` and `python -m gpt2c`: the command line; Ctrl-C may also come during its imports."""

import sys


def run() -> int:
    """Run the command line; return its exit code."""
    try:
        from gpt2c.cli.main import main

        return main()
    except KeyboardInterrupt:
        print("gpt2c: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
