"""`python -m peft_bsr.cli`."""

import sys

from peft_bsr.cli.entry import main

sys.exit(main())
