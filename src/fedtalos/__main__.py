"""`python -m fedtalos ...` is `fedtalos ...`."""

from fedtalos.cli import main

if __name__ == "__main__":
    main()
