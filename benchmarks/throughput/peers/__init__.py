"""Other libraries on the same rows, each in a virtual environment and a process of its own."""
