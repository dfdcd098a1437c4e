"""`python -m oneshot_ednas` is the command line."""

from oneshot_ednas.cli import main

if __name__ == "__main__":
    main()
