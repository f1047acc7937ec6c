"""All uses of private interfaces of peft, transformers and torch, each behind a name of this package.

The libraries do not guarantee them. tests/compat has a test for each, which fails by name on a release that removes or
changes it. This file imports nothing, because `core` and `ops` may import torch only.
"""
