"""One module per op: its Python signature, its manual page, its fake for `torch.compile`."""
