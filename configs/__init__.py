"""One experiment, one file; each says in its docstring how to run it and what to expect."""
