"""The measurements of `scripts/bench`, a file for each; programs that they start have their own."""
