"""`python -m racm3_jax` is the command `racm3`."""

import sys

from racm3_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
