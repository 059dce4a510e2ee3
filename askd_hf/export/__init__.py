"""Other runtimes, one file each."""
