"""`python -m tokendepot`: the command line."""

from .cli import main

main()
