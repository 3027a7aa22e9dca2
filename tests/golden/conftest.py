"""What needs the official codes beside it, or TorchJD, is no test."""

collect_ignore = ["record_official.py"]
