"""The command line: one file a verb; `main.py` catches every error in one place."""
