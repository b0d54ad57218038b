"""``python -m sslmed``, and so ``torchrun -m sslmed``: the command line."""

from sslmed.cli import main

if __name__ == "__main__":
    main()
