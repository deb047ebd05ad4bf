"""`python -m pisa_fl`: the same as `pisa-fl`."""

from pisa_fl.cli.main import main

if __name__ == "__main__":
    main()
