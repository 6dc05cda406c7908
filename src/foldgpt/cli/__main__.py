"""`python -m foldgpt.cli`, for launchers that start a module."""

from foldgpt.cli import main

if __name__ == "__main__":
    main()
