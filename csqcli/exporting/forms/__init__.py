"""The forms that ship with csq, one file per engine."""
