"""`python -m gateway.server`: the same as the command `aiconexus-gateway`."""

from gateway.cli import main

if __name__ == "__main__":
    main()
