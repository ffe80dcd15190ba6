"""`winnow demo`: the whole pipeline at work on real input that every machine has."""
