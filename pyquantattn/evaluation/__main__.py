"""``python -m pyquantattn.evaluation``."""

import sys

from pyquantattn.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
