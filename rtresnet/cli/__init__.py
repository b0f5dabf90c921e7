"""The command line: one file for each command; `main.py` catches every error in one place."""
