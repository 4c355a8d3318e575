"""Runs the command `jdrop` from a checkout: how many networks is one dropout network worth?"""

import sys

from jdrop.study import main

if __name__ == "__main__":
    sys.exit(main())
