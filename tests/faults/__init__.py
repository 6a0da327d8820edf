"""Faults done to csq on purpose, and what must still be true afterwards.

``python -m tests.faults --cycles 50 --seed 0`` (about 2 minutes on two cores) runs all of them; ``--every-operation``
kills a search before and after each of its file operations in turn. tests/test_faults.py runs a few of each.

Every run is a fork of this process, which has imported everything: a cycle takes half a second instead of six.
"""
