"""From archives, as they are distributed, to the folders that the data sets are read from."""
