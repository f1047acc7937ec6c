"""`python -m peft_bsr.cli`."""

import sys

from peft_bsr.cli.main import main

sys.exit(main())
