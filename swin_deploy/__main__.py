"""Run the command line: python -m swin_deploy."""

from .cli import main

if __name__ == "__main__":  # processes that multiprocessing spawns import this file, too
    main()
