"""Scale on paper and in compiled programs."""
