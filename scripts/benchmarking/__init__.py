"""What the timing programs share: random models, request inputs, load generators, statistics, comparisons, reports."""
