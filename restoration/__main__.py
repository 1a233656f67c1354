"""python -m restoration"""

from restoration.cli import main

if __name__ == "__main__":
    main()
