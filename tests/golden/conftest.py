# Scripts and helpers, not tests: record.py needs torch, and pytest would import it to look for doctests.
collect_ignore = ["comparisons.py", "record.py"]
