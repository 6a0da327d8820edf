"""The data sources that csq brings along. Every module in this folder is one, found without being listed anywhere.

The modules import torch inside their functions only, so that ``csq search --help`` can show their help lines quickly.
"""
