"""What a command leaves behind: a run directory (run.py), plots and one self-contained page (page.py)."""
