"""The command line's tiny model in a folder, under the name that the app's tests use."""

from tests.cli.conftest import base as tiny

__all__ = ["tiny"]
