"""The paper's tables and figures again: which runs each needs, running what is missing, and the page beside the paper's."""
