"""The command line: it parses, prints and draws what the rest of the package does."""
