"""What check.py looks at: the machine, whether operations are right on it, how fast they are, what fits."""
