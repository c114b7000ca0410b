"""The command line: everything that parses arguments or prints."""
