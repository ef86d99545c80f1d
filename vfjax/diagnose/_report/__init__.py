"""A report of what broke, where, and what to do."""
