"""What meets Lightning and a user's module: the only files that know how either works."""
