# Scripts, not tests: they need torch and take minutes, and pytest would import them to look for doctests.
collect_ignore_glob = ["*.py"]
