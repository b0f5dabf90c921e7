"""`python -m rtresnet`, for machines where the script is not on the path, and for torchrun."""

import sys

from rtresnet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
