"""`python -m jaxformers` is the `jaxformers` command."""

from jaxformers.cli import main

if __name__ == "__main__":
    main()
