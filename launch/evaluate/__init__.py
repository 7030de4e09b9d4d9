"""What evaluate.py does, one file per task."""
