"""`python -m lowbit_tools …`: what `torchrun … -m lowbit_tools …` starts on every rank."""

import sys

from lowbit_tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
