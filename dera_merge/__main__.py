"""`python -m dera_merge`."""

from .cli import main

main()
