"""Many runs of one experiment, and what choosing among them costs."""
