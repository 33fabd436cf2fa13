"""Training as a composition of pure functions. Read step.py first."""
