"""python -m benchmarks."""

import sys


def _main() -> int:
    try:
        from benchmarks.cli import main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("curvopt", "benchmarks"):
            raise
        print(f'error: {error.name} is not installed: pip install "curvopt-torch[bench]"', file=sys.stderr)
        return 2
    return main()


if __name__ == "__main__":
    sys.exit(_main())
