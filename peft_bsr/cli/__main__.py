"""`python -m peft_bsr.cli`."""

import sys

from peft_bsr_cli import main

sys.exit(main())
