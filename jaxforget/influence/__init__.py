"""Which training data causes which behaviour: one file a method, one row in METHODS."""
