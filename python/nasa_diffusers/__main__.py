"""`python -m nasa_diffusers`: see `cli.py`."""

import sys

from nasa_diffusers.cli import main

sys.exit(main())
