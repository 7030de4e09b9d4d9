"""The tasks of evaluate.py, one file each, named as in conf/task: its `Options` and its `main`."""
