"""Rankings beside what the answer attended to: ``claa-ops oracle``."""
