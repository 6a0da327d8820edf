"""`csq sweep`: one model at many targets, what they share done once, and the trade-off they make as a page."""
