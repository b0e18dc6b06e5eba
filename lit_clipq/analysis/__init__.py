"""Turn the results of runs into tables."""
