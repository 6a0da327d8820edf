"""Quantized file → a file that is small or runs elsewhere, each read back and compared before it gets its name.

`run` is the page to start at; `unpacking` and `onnx_graph` make the ONNX form, `runtime` runs it, `verify` compares.
The safetensors forms themselves are in `csqcli.storage`, because every reader needs them.
"""
