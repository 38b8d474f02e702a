"""Plans: which runs make a table, how far each is, and running what is missing."""
