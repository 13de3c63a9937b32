"""`python -m nasa_distill`; see `nasa_distill.cli`."""

from nasa_distill.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
