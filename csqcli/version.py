"""The version of csq, where rooms below the front door can read it."""

__version__ = "0.3.0.dev0"
