"""From a folder of files to what a store gets: which files, whose, read together, kept."""
