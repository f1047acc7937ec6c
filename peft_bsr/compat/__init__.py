"""Private interfaces of peft, transformers and torch, each under a name of its own; the rest of the package asks here.

None of them is promised by its library. tests/compat has a test for each, which fails by name on a release where it is
gone or different. Nothing is imported here: `core` and `ops` know torch alone.
"""
