"""Say the last words of a process that died without a chance to say them.

A script of its own, which imports nothing of ours: it reads lines from its standard
input until that ends, which is when the process that writes them ends, however that
comes about (the runtime aborts it, the system kills it). Then it prints the newest
line. An empty line takes the words back.
"""

import sys


def main() -> None:
    """Wait for the end, and speak."""
    words = ""
    for line in sys.stdin:
        words = line.strip()
    if words:
        sys.stderr.write(f"{words}\n")


if __name__ == "__main__":
    main()
