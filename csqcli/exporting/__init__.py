"""Quantized file → a file that is small or runs elsewhere, each read back and compared before it gets its name.

`run` is the page to start at, `form` the seam: one class per form, those of csq in `forms`. `unpacking`, `onnx_graph` and
`int8_graph` make the ONNX form, `runtime` runs it, `verify` compares. How safetensors forms are laid out is in `file.layout`,
because every reader needs it.
"""
