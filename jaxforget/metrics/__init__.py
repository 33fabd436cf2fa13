"""What a model knows and shows: each file a family of measures, benchmark.py the table of those of unlearning."""
