"""`python -m peft_bsr`, for where the script `peft-bsr` is not on the path."""

import sys

from peft_bsr_cli import main

sys.exit(main())
