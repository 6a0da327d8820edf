DEFAULT_RECIPE = "short"  # where none is named
