"""What a model knows (language.py), and whether it shows what it was trained on (membership.py)."""
