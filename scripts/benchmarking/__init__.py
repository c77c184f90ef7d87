"""What the timing programs do, and what they share: models, inputs, load generators, statistics, reports."""
