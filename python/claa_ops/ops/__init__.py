"""One module per op: its Python signature, its docstring, its fake for ``torch.compile``."""
