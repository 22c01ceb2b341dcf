"""How good samples are: features, distances, tables, pictures, and the report of a ladder."""
